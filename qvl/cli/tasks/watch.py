"""`qvl watch`: the flags. The work is `qvl.tasks.watching`'s, which loads only for this command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qvl.cli.tasks import flags


def watch(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[FILE|FOLDER|URL]... [QUESTION]",
            help="Videos, folders of them, addresses; - is standard input. Then the question [default: Describe the "
            "video.]",
        ),
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames looked at in a second; fewer make longer parts.")] = 2.0,
    begin: Annotated[str, typer.Option("--from", metavar="TIME", help="Where to begin: 90, 1:30 or 1:00:00.")] = "0",
    end: Annotated[
        str | None, typer.Option("--to", metavar="TIME", help="Where to end [default: the end of the video]")
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary/--no-summary", help="One answer over all parts of a long video.")
    ] = True,
    output: flags.Output = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    max_tokens: flags.MaxTokens = None,
    base_url: flags.BaseUrl = None,
    model: flags.ModelName = None,
    api_key: flags.ApiKey = None,
    concurrency: flags.Concurrency = 1,
) -> int:
    """Ask about videos: `qvl watch clip.mp4 "What happens?"`.

    A video that does not fit into one question is watched in parts, each with its times, and a summary follows.
    """
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.tasks.status import tell
    from qvl.cli.who import Who
    from qvl.tasks.film import seconds_of
    from qvl.tasks.watching import QUESTION, Watch

    def progress(line: str) -> None:
        sys.stderr.write("\r\x1b[K")
        tell(line)

    files, question = split(inputs or [])
    how = How(files, None, None, output, as_json, quiet, max_tokens)
    streamed = how.to_terminal and len(files) < 2
    task = Watch(
        question=QUESTION if question is None else question,
        fps=fps,
        begin=seconds_of(begin),
        end=None if end is None else seconds_of(end),
        summary=summary,
        tell=progress if sys.stderr.isatty() and not (quiet or streamed) else None,
    )
    who = Who(base_url, model, api_key, concurrency)
    return perform(task, how, who)


def split(words: list[str]) -> tuple[list[str], str | None]:
    """The files and the question: the last word, where it names nothing to watch."""
    from qvl.client import media_kind

    if not words or words[-1] == "-" or media_kind(words[-1]) == "video" or "://" in words[-1]:
        return words, None
    try:
        is_file = bool(words[-1]) and Path(words[-1]).expanduser().exists()
    except (OSError, ValueError):  # too long for a name
        is_file = False
    return (words, None) if is_file else (words[:-1], words[-1])
