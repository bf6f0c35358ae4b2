"""Writes docs/flags.md from the commands themselves: `python tools/write_flags.py [--check]`.

Knows how typer describes a command. Does not know any flag.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.cli.app import app

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEAD = """# Commands and flags

Written by `tools/write_flags.py` from the commands themselves; `make check` fails when it is out of date. Every flag
may be written with dashes or underscores, its value after a space or an equals sign. A flag's environment variable
stands beside it. `qvl --version` is short for `qvl version`; `qvl --install-completion` teaches bash, zsh or fish to
complete commands and flags.

Answers go to stdout, everything else to stderr; a mistake or an error is one line.

| exit code | |
|---|---|
| 0 | done; a server: drained after Ctrl-C or SIGTERM |
| 1 | it did not work out: no server answers, a request failed, some lines of a batch have no answer |
| 2 | a mistake: a flag, a file, a checkpoint, or a request that the server refuses |
| 130 | Ctrl-C |
"""


def page() -> str:
    """The whole document."""
    parts = [HEAD]
    for path, command in commands("qvl", typer.main.get_command(app)):
        usage = " ".join([path, *(argument(p) for p in command.params if not is_option(p)), "[FLAGS]"])
        parts += [f"## {path}\n", f"    {usage}\n", paragraph(command.help or "") + "\n", *tables(command)]
    return "\n".join(parts)


def commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    """(full name, command) of every leaf."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from commands(f"{path} {name}", child)


def tables(command: Any) -> Iterator[str]:
    """One table per panel, in the order of the command's own parameters."""
    panels: dict[str, list[str]] = {}
    for param in command.params:
        title = getattr(param, "rich_help_panel", None) or ("Flags" if is_option(param) else "Arguments")
        panels.setdefault(title, []).append(row(param))
    for title, rows in panels.items():
        yield "\n".join([f"| {title} | default | |", "|---|---|---|", *rows, ""])


def row(param: Any) -> str:
    names = (
        " / ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
        if is_option(param)
        else argument(param)
    )
    text = paragraph(getattr(param, "help", None) or "")
    text, _, told = text.partition(" [default: ")
    default = told.removesuffix("]") if told else plain_default(param)
    variable = f" (`{param.envvar}`)" if getattr(param, "envvar", None) else ""
    return f"| {escaped(names)}{variable} | {escaped(default)} | {escaped(text)} |"


def plain_default(param: Any) -> str:
    if param.required or param.default is None or callable(param.default):
        return ""
    if isinstance(param.default, bool):
        return "on" if param.default else "off"
    return f"`{param.default}`" if str(param.default) else ""


def argument(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[]") if "..." not in str(param.metavar) else param.metavar
    return name if param.required or "[" in name else f"[{name}]"


def is_option(param: Any) -> bool:
    return param.param_type_name == "option"


def paragraph(text: str) -> str:
    return " ".join(text.split())


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(
            "docs/flags.md is up to date" if same else "docs/flags.md is out of date: run python tools/write_flags.py"
        )
        return 0 if same else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
