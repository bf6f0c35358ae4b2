"""`qvl describe`: the flags. The work is `qvl.tasks.description`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags


def describe(
    inputs: flags.Inputs = None,
    length: Annotated[Literal["short", "medium", "long"], typer.Option(help="One sentence, some, or many.")] = "medium",
    lang: Annotated[str, typer.Option(help="The language of the answer: zh, en, fr, Swahili.")] = "en",
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
    """Describe pictures and videos: `qvl describe photo.jpg --length short --lang zh`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks.description import MAX_TOKENS, Describe

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(Describe(length=length, lang=lang, max_tokens=MAX_TOKENS[length]), how, who)
