"""`qvl compare`: the flags, and two inputs for one result. The work is `qvl.tasks.comparison`'s."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A picture or an address; - is standard input.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw",
            metavar="FILE",
            help="Write A there, pale, with the pixels in red that are others in B, and a box around each place.",
            rich_help_panel=flags.OUTPUT_PANEL,
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Ask for a list of differences; --json does so too.")] = False,
    lang: Annotated[Literal["en", "zh"], typer.Option(help="The language to ask in.")] = "en",
    pages: flags.PageRange = None,
    dpi: flags.Dpi = None,
    output: flags.Output = None,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    max_tokens: flags.MaxTokens = None,
    base_url: flags.BaseUrl = None,
    model: flags.ModelName = None,
    api_key: flags.ApiKey = None,
) -> int:
    """Tell what differs between two pictures: `qvl compare before.png after.png --draw changes.png`.

    Pictures that are the same to the last pixel need no model. With `--json`: a list of differences, and the places
    where the pixels differ.
    """
    from qvl.cli.tasks.pairs import perform_pair
    from qvl.cli.tasks.perform import How
    from qvl.cli.who import Who
    from qvl.tasks.comparison import Compare

    task = Compare(listed=listed or as_json, lang=lang)
    how = How((first, second), pages, dpi, output, as_json, quiet, max_tokens)
    return perform_pair(task, how, Who(base_url, model, api_key), draw)
