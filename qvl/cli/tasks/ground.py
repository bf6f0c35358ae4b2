"""`qvl ground`: the flags. The work is `qvl.tasks.grounding`'s, which loads only for this command."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags
from qvl.errors import InvalidRequest


def ground(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="What to look for: 'the dog', 'the word \"OPEN\"'.")],
    inputs: flags.Inputs = None,
    also: Annotated[
        list[str] | None, typer.Option("--also", metavar="TEXT", help="Another thing to look for; may be repeated.")
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            metavar="FILE|FOLDER",
            help="Write the picture with the boxes drawn there; a folder gets one for each.",
            rich_help_panel=flags.OUTPUT_PANEL,
        ),
    ] = None,
    coordinates: Annotated[
        Literal["auto", "relative", "absolute"],
        typer.Option(
            help="How the model counts: thousandths of the picture (relative: Qwen2-VL, Qwen3-VL), or pixels of the "
            "picture as it sees it (absolute: Qwen2.5-VL). auto: by its name, else by its answer."
        ),
    ] = "auto",
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask in your own words, with {what} in them.")
    ] = None,
    pages: flags.PageRange = None,
    dpi: flags.Dpi = None,
    output: flags.Output = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    max_tokens: flags.MaxTokens = None,
    base_url: flags.BaseUrl = None,
    model: flags.ModelName = None,
    api_key: flags.ApiKey = None,
    concurrency: flags.Concurrency = 4,
) -> int:
    """Find things in pictures, as boxes in the picture's own pixels: `qvl ground "the dog" photo.jpg --draw out.png`.

    Prints JSON: label and box (left, top, right, bottom) of each; `[]` when there is none.
    """
    if not inputs and os.path.isfile(what):
        raise InvalidRequest(f"'{what}' is a file, and what to find comes before it: qvl ground WHAT {what}")
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.tasks.pictures import PictureSink
    from qvl.cli.tasks.status import tell
    from qvl.cli.who import Who
    from qvl.tasks.boxes import Found
    from qvl.tasks.grounding import Ground
    from qvl.tasks.marks import Picture, draw_marks

    def drawn(picture: Picture, found: tuple[Found, ...]) -> Picture:
        drawing = draw_marks(picture, found)
        if drawing.numbered and not quiet:
            tell("no font of this machine has the characters of some labels: in the picture they are numbers")
        return drawing.picture

    task = Ground(what=what, also=tuple(also or ()), coordinates=coordinates, template=prompt)
    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    extra = None if draw is None else lambda found: PictureSink(draw, found, drawn)
    return perform(task, how, who, extra=extra)
