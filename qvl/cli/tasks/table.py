"""`qvl table`: the flags. The work is `qvl.tasks.tables`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags


def table(
    inputs: flags.Inputs = None,
    to: Annotated[
        Literal["markdown", "csv", "html", "json"], typer.Option(help="The form that is printed.")
    ] = "markdown",
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
    concurrency: flags.Concurrency = 4,
) -> int:
    """Read the table in a picture: `qvl table invoice.png`, `qvl table report.pdf --to csv -o tables/`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks import ReadTable

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(ReadTable(to=to, lang=lang), how, who)
