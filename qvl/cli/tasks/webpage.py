"""`qvl webpage`: the flags. The work is `qvl.tasks.screenshot`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated

import typer

from qvl.cli.tasks import flags


def webpage(
    inputs: flags.Inputs = None,
    beside: Annotated[
        str | None,
        typer.Option(
            "--side-by-side",
            metavar="FILE|FOLDER",
            help="Write the screenshot and the page as Chromium shows it there, side by side; a folder gets a picture "
            "for each. The browser is found by its usual names, or in CHROME_PATH.",
            rich_help_panel=flags.OUTPUT_PANEL,
        ),
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
    """Make a screenshot into one self-contained HTML file: `qvl webpage shot.png -o page.html`.

    The page loads nothing from elsewhere and runs no scripts; what the model put in of both is taken out and named.
    """
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.tasks.pictures import PictureSink
    from qvl.cli.who import Who
    from qvl.tasks.screenshot import Webpage, side_by_side

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    extra = None if beside is None else lambda found: PictureSink(beside, found, side_by_side)
    return perform(Webpage(), how, who, extra=extra)
