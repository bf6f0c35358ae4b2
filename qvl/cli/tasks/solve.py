"""`qvl solve`: the flags. The work is `qvl.tasks.solution`'s, which loads only for this command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags


def solve(
    inputs: flags.Inputs = None,
    answer_only: Annotated[bool, typer.Option("--answer-only", help="Print the final answer alone.")] = False,
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
    """Solve a problem of mathematics step by step, from a picture or piped text: `qvl solve homework.png`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks import Solve

    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(Solve(lang=lang, answer_only=answer_only), how, who)
