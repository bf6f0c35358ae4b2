"""`--served-model-name a b`: several names after one flag, as other servers take them, beside a flag for each.

Knows how a command line is cut into flags, values and arguments. Does not know what the names are for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

FLAG = "--served-model-name"


class NamingCommand(TyperCommand):
    """A command with one argument, MODEL, and the flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        switches = (param for param in self.get_params(ctx) if getattr(param, "is_flag", False))
        bare = {name for switch in switches for name in [*switch.opts, *switch.secondary_opts]}
        return super().parse_args(ctx, with_flag_repeated(args, bare))


def with_flag_repeated(words: Sequence[str], bare: Collection[str]) -> list[str]:
    """`MODEL FLAG a b` as `MODEL FLAG a FLAG b`. `bare` are the flags that take no value.

    A word is a further name only when MODEL stands before it, so that `FLAG a MODEL` keeps its meaning.
    """
    written: list[str] = []
    model_given = value_follows = naming = False
    for n, word in enumerate(words):
        if value_follows:
            value_follows = False
        elif word == "--":
            return [*written, *words[n:]]
        elif word.startswith("-"):
            name, equals, _ = word.replace("_", "-").partition("=")
            naming, value_follows = name == FLAG, not equals and name not in bare
        elif naming and model_given:
            written.append(FLAG)
        else:
            naming, model_given = False, True
        written.append(word)
    return written
