"""`qvl translate`: the flags. The work is `qvl.tasks.translation`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated

import typer

from qvl.cli.tasks import flags


def translate(
    inputs: flags.Inputs = None,
    to: Annotated[str, typer.Option(help="A language's code or name: zh, en, fr, Swahili.")] = "en",
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
    """Translate the text in pictures, or piped text: `qvl translate --to zh sign.jpg`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks import Translate

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(Translate(to=to), how, who)
