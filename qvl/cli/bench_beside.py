"""`qvl bench beside`: servers measured side by side in one run. Knows flags and printing; the turns are taken in
`qvl.bench.load.beside`."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli.version import installed
from qvl.errors import ConfigError, RequestFailed, Unavailable

if TYPE_CHECKING:
    from qvl.bench.load.beside import Comparison, Measured
    from qvl.bench.load.worker import Target

MOST_SEEDS = 10**9
ROWS = (  # field, label, whether more is better
    ("text_ttft_ms", "prompt to first token, ms", False),
    ("tpot_ms", "per token after it, ms", False),
    ("picture_ttft_ms", "picture to first token, ms", False),
    ("streams_tok_s", "all streams, tokens/s", True),
)


def beside(
    servers: Annotated[
        list[str],
        typer.Argument(metavar="NAME=URL...", help="Running servers; the first is compared with the others."),
    ],
    input_tokens: Annotated[int, typer.Option(min=1, help="Text in each prompt, beside the template.")] = 96,
    output_tokens: Annotated[int, typer.Option(min=2, help="Length of each answer.")] = 32,
    picture: Annotated[str, typer.Option(metavar="WxH", help="Size of the picture, or none.")] = "448x448",
    streams: Annotated[int, typer.Option(min=1, help="Texts that are answered at once; 1 leaves this out.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 3,
    seed: Annotated[
        int | None, typer.Option(help="Draws the texts and pictures [default: a new one each time]")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one whole answer.")] = 600.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="QVL_API_KEY", help="The key of those servers that want one.")
    ] = None,
) -> None:
    """Measure running servers side by side: each round asks every one of them the same fresh prompts, in turn, alone.

    Whatever disturbs the machine disturbs all. A table of medians comes first; the last line is one JSON object.
    """
    from qvl.bench.load import run
    from qvl.bench.load.beside import Comparison, compare, read_target

    comparison = Comparison(input_tokens, output_tokens, picture_size(picture), streams, rounds)
    named = dict(read_target(server) for server in servers)
    if len(named) < max(2, len(servers)):
        raise ConfigError("name at least two servers, each by a name of its own")
    targets = {name: _connect(name, url, api_key, timeout) for name, url in named.items()}
    drawn = secrets.randbelow(MOST_SEEDS) if seed is None else seed
    measured = compare(
        targets,
        comparison,
        drawn,
        lambda target, load: run.measure(target, load, processes=1, warm_up=0, tell=lambda _: None),
        _tell,
    )
    for line in _table(measured):
        print(line)
    print(json.dumps(_record(named, comparison, drawn, measured)))


def _connect(name: str, url: str, api_key: str | None, timeout: float) -> Target:
    from qvl.bench.load import run

    try:
        return run.connect(url, model=None, api_key=api_key, timeout=timeout, options={"ignore_eos": True})
    except (Unavailable, RequestFailed) as error:
        raise type(error)(f"{name}: {error}") from error


def _table(measured: dict[str, Measured]) -> list[str]:
    """A column for each server; behind every one but the first, how the first compares with it."""
    from qvl.bench.load.beside import ratio

    first, *others = measured
    widths = {name: max(12, 2 + len(name)) for name in measured}
    head = "".join(f"{name:>{widths[name]}}{'':>8}" for name in others)
    lines = [f"{'median of rounds':<28}{first:>{widths[first]}}{head}".rstrip()]
    for field, label, more in ROWS:
        ours = getattr(measured[first], field)
        if ours is None:
            continue
        cells = f"{ours:>{widths[first]}.1f}"
        for name in others:
            theirs = getattr(measured[name], field)
            part = ratio(ours, theirs)
            wide = widths[name]
            cells += f"{'-':>{wide}}{'':>8}" if part is None else f"{theirs:>{wide}.1f}{f'({part:.2f}x)':>8}"
        lines.append(f"{label:<28}{cells}" + ("   more is better" if more else ""))
    tokens = ", ".join(f"{name} {one.prompt_tokens:g}" for name, one in measured.items())
    return [*lines, f"(x: {first} as a part of that server's figure; tokens of a text prompt: {tokens})"]


def _record(urls: dict[str, str], comparison: Comparison, seed: int, measured: dict[str, Measured]) -> dict[str, Any]:
    """Everything that makes the figures repeatable."""
    return {
        "bench": "beside",
        "servers": urls,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"qvl": installed("qvl")},
        "comparison": dataclasses.asdict(comparison),
        "seed": seed,
        "measured": {name: dataclasses.asdict(one) for name, one in measured.items()},
    }


def picture_size(text: str) -> tuple[int, int] | None:
    """ "640x480" -> (width, height); "none" -> None."""
    if text == "none":
        return None
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ConfigError(f"--picture takes a size such as 448x448 (width x height) or none, not '{text}'")
    return int(match[1]), int(match[2])


def _tell(line: str) -> None:
    print(f"qvl: {line}", file=sys.stderr, flush=True)
