"""The `qvl` command: which commands there are, and how a mistake or an error ends.

Every command is one file beside this one and one line here. Flags may be written with dashes or underscores. A mistake
is one line on stderr and exit code 2; errors of the error tree carry their own exit code; Ctrl-C is 130. Knows no
command's work.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from qvl.cli import ask, batch, bench, chat, check, serve, version
from qvl.cli.familiar import HINTS
from qvl.cli.group import ClickError, Commands
from qvl.cli.names import NamingCommand
from qvl.cli.tasks import compare, describe, extract, ground, ocr, solve, table, translate, watch, webpage
from qvl.engine.openmp import wait_asleep
from qvl.errors import QvlError, suggest


def dashes(name: str) -> str:
    """`--max_model_len` is `--max-model-len`."""
    return name.replace("_", "-")


def _print_version(wanted: bool) -> None:
    if wanted:
        version.version()
        raise typer.Exit


app = typer.Typer(
    name="qvl",
    cls=Commands,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"token_normalize_func": dashes, "help_option_names": ["-h", "--help"]},
)


@app.callback()
def root(
    show_version: Annotated[
        bool,
        typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="As `qvl version`."),
    ] = False,
) -> None:
    """Serve the Qwen-VL family from a checkpoint folder, on a GPU or just a CPU."""


app.command("serve", cls=NamingCommand)(serve.serve)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("batch")(batch.batch)
app.command("ocr", rich_help_panel="Tasks")(ocr.ocr)
app.command("translate", rich_help_panel="Tasks")(translate.translate)
app.command("table", rich_help_panel="Tasks")(table.table)
app.command("solve", rich_help_panel="Tasks")(solve.solve)
app.command("describe", rich_help_panel="Tasks")(describe.describe)
app.command("extract", rich_help_panel="Tasks")(extract.extract)
app.command("ground", rich_help_panel="Tasks")(ground.ground)
app.command("watch", rich_help_panel="Tasks")(watch.watch)
app.command("webpage", rich_help_panel="Tasks")(webpage.webpage)
app.command("compare", rich_help_panel="Tasks")(compare.compare)
app.command("check")(check.check)
app.add_typer(bench.app, name="bench")
app.command("version")(version.version)


def run(arguments: Sequence[str]) -> int:
    """The exit code of `qvl ARGUMENTS...`."""
    try:
        code = app(args=list(arguments), prog_name="qvl", standalone_mode=False)
        sys.stdout.flush()
    except QvlError as error:
        return _fail(error.message, error.exit_code)
    except ClickError as error:
        return _fail(_usage_message(error), getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`qvl ask ... | head -1`): nothing is wrong, and nothing more can be said.
        _say_no_more()
        return 0
    except OSError as error:  # a full disk under the output, a terminal that has gone
        _say_no_more()
        named = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return _fail(f"{named}{error.strerror or error}", 1)
    except UnicodeEncodeError:
        # Bytes of another encoding become half characters in Python; files may have such names, texts may not.
        return _fail("a text on the command line is not in the terminal's encoding; is LANG right?", 2)
    return code if isinstance(code, int) else 0


def main() -> None:
    """The command on this process's arguments. A character that the terminal cannot show becomes a question mark."""
    _open_closed_streams()
    wait_asleep(os.environ)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(run(sys.argv[1:]))


def _open_closed_streams() -> None:
    """A closed stream (`qvl ask ... <&-`) is an empty one, and its number must not go to a socket."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _say_no_more() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    print(f"qvl: {message}", file=sys.stderr)
    return code


def _usage_message(error: Exception) -> str:
    """Click's message as one line, with the closest flag and the help page to look at."""
    name = getattr(error, "option_name", None)
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "qvl"
    if name in HINTS and command == "qvl serve":
        message = f"there is no {name} here: {HINTS[name]}"
    elif name is not None:
        message = f"{getattr(error, 'message', error)}{suggest(name, getattr(error, 'possibilities', None) or ())}"
    else:
        message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        message = message.replace(": Value error, ", ": ")  # pydantic's word for what stands behind it
    return f"{message} (see {command} --help)"
