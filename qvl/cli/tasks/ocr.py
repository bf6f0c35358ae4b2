"""`qvl ocr`: the flags. The work is `qvl.tasks.text`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags


def ocr(
    inputs: flags.Inputs = None,
    to: Annotated[
        Literal["text", "layout", "json"],
        typer.Option(help="Lines of text; set out as on the page; or JSON with the box of every line."),
    ] = "text",
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
    """Read the text in pictures and PDFs: `qvl ocr scan.png`, `qvl ocr report.pdf --pages 1-3 -o report.txt`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks import Ocr, OcrLines

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(Ocr(lang=lang) if to == "text" else OcrLines(to=to, lang=lang), how, who)
