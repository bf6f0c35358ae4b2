"""`qvl extract`: the flags. The work is `qvl.tasks.fields`'s, which loads only for this command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvl.cli.tasks import flags
from qvl.errors import ConfigError


def extract(
    inputs: flags.Inputs = None,
    schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A JSON schema that every answer keeps to.")
    ] = None,
    fields: Annotated[
        str | None, typer.Option(metavar="NAMES", help="In place of a schema: names with commas between, each a text.")
    ] = None,
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
    """Extract fields from pictures as JSON that is always valid: `qvl extract --schema invoice.json scan.png`."""
    from qvl.cli.tasks.perform import How, perform
    from qvl.cli.who import Who
    from qvl.tasks import Extract
    from qvl.tasks.schema import Schema

    if (schema is None) == (fields is None):
        raise ConfigError("say what is wanted with --schema FILE or with --fields NAMES")
    wanted = Schema.from_file(schema) if schema is not None else Schema.of_fields((fields or "").split(","))
    who = Who(base_url, model, api_key, concurrency)
    how = How(inputs or [], pages, dpi, output, as_json, quiet, max_tokens)
    return perform(Extract(schema=wanted, lang=lang), how, who)
