"""A group of commands, `qvl` itself or `qvl bench`: what it says to a name that it does not have, or to none.

Knows click's groups. Does not know which commands there are.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from qvl.cli.familiar import COMMANDS
from qvl.errors import suggest

# Newer releases of typer bring their own copy of click, older ones depend on it: both are found through a subclass.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ClickError: type[Exception] = typer.BadParameter.__mro__[2]


class Commands(TyperGroup):
    """A group that says what to do instead of a command that it does not have; without a name it shows its help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ([] if ctx.resilient_parsing else ["--help"]))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"there is no command {name[:80]!r} {self._instead(ctx, name)}", ctx)
        return super().resolve_command(ctx, args)

    def _instead(self, ctx: Any, name: str) -> str:
        if ctx.parent is not None:  # few enough to be named
            return f"in {ctx.command_path}: there are {', '.join(self.commands)}"
        return f"here: {COMMANDS[name]}" if name in COMMANDS else f"here{suggest(name.lower(), self.commands)}"
