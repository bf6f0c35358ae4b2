"""`qvl bench serve`: client load against any OpenAI-compatible server. Knows flags and printing; the load is put on and
timed in `qvl.bench.load`."""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from qvl.bench.load import cases
from qvl.bench.load.cases import CASES, Load
from qvl.cli.version import installed
from qvl.errors import ConfigError, suggest
from qvl.types import DEFAULT_URL

if TYPE_CHECKING:
    from qvl.bench.load.figures import Figures
    from qvl.bench.load.worker import Target

SUITE = "suite"
WARM_UP = 16
MOST_SEEDS = 10**9

LOAD_PANEL = "Load"
CLIENT_PANEL = "Client"

T = TypeVar("T", int, float)


def serve(
    case: Annotated[
        str | None,
        typer.Argument(
            metavar="[CASE]",
            help=f"{', '.join(CASES)}, or suite for all of them [default: the flags below alone]",
        ),
    ] = None,
    base_url: Annotated[
        str, typer.Option(envvar="QVL_BASE_URL", help="The server, with or without /v1.")
    ] = DEFAULT_URL,
    model: Annotated[str | None, typer.Option(help="A name the server serves [default: the first it names]")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="QVL_API_KEY", help="The server's key.")] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, help="Requests that count [default: 64]", rich_help_panel=LOAD_PANEL)
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Requests always under way [default: 8]", rich_help_panel=LOAD_PANEL),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Requests a second that arrive at random times (a Poisson process), instead of --concurrency.",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None,
    input_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Text in each prompt, beside template and pictures [default: 64]", rich_help_panel=LOAD_PANEL
        ),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of each answer [default: 128]", rich_help_panel=LOAD_PANEL)
    ] = None,
    num_pictures: Annotated[
        int | None, typer.Option(min=0, help="Pictures in each request [default: 1]", rich_help_panel=LOAD_PANEL)
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="Size of the pictures [default: 1024x1024]", rich_help_panel=LOAD_PANEL),
    ] = None,
    same_picture: Annotated[
        bool,
        typer.Option("--same-picture", help="Every request shows the same picture.", rich_help_panel=LOAD_PANEL),
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Run once for each of these concurrencies.", rich_help_panel=LOAD_PANEL),
    ] = None,
    sweep_rates: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="Run once for each of these request rates.", rich_help_panel=LOAD_PANEL),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw latency against load here (PNG).", rich_help_panel=LOAD_PANEL)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Draws the texts and pictures [default: a new one each time, told in the JSON]",
            rich_help_panel=LOAD_PANEL,
        ),
    ] = None,
    warm_up: Annotated[
        int,
        typer.Option(
            min=0,
            help="Requests of the same kind before each run; they count for nothing.",
            rich_help_panel=CLIENT_PANEL,
        ),
    ] = WARM_UP,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="They share the load [default: half the cores, at most 4]", rich_help_panel=CLIENT_PANEL
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one whole answer.", rich_help_panel=CLIENT_PANEL)] = 600.0,
    ignore_eos: Annotated[
        bool,
        typer.Option(
            "--ignore-eos/--no-ignore-eos",
            help="Send ignore_eos, so that every answer has its full length. Off for servers that refuse the field.",
            rich_help_panel=CLIENT_PANEL,
        ),
    ] = True,
    extra_body: Annotated[
        str | None,
        typer.Option(
            metavar="JSON",
            help='Further fields of every request; null leaves a field out: {"max_tokens": null}.',
            rich_help_panel=CLIENT_PANEL,
        ),
    ] = None,
) -> None:
    """Measure a running server: time to first token, time per token, throughput.

    Requests are streamed and greedy, with texts and pictures that no other request shares. Flags change the case they
    stand beside. A table comes first; the last line is one JSON object. The exit code is 1 when a request failed.
    """
    changes = {
        "requests": requests,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "pictures": num_pictures,
        "same_picture": same_picture or None,
        # A server that is asked the same twice answers from its caches.
        "seed": seed if seed is not None else secrets.randbelow(MOST_SEEDS),
        **_size(picture),
        **_arrival(concurrency, rate),
    }
    loads = [_changed(load, changes) for load in _cases(case)]
    if (picture is not None or same_picture) and not any(load.pictures for load in loads):
        raise ConfigError("--picture and --same-picture: there are no pictures in this load; see --num-pictures")
    if sweep is not None or sweep_rates is not None:
        loads = _sweep(loads, sweep, sweep_rates, given=concurrency is not None or rate is not None)
    elif plot is not None:
        raise ConfigError("--plot draws latency against load: it needs --sweep or --sweep-rates")
    _check_plot(plot)
    options = ({"ignore_eos": True} if ignore_eos else {}) | _json_object(extra_body)
    # What draws and sends is loaded now: numpy and Pillow are no business of the other commands.
    from qvl.bench.load import run
    from qvl.bench.load.plot import save_plot

    target = run.connect(base_url, model=model, api_key=api_key, timeout=timeout, options=options)
    _tell(f"{target.model} at {base_url}; a word is {target.tokens_per_word:.2f} tokens there")
    figures = _measure(target, loads, processes or run.default_processes(), warm_up)
    print(json.dumps(_record(base_url, target, figures)), flush=True)  # before what may fail: it cost the time
    if plot is not None:
        try:
            save_plot(plot, f"{target.model}, {loads[0].name}: {loads[0].content}", figures)
        except OSError as error:
            raise ConfigError(f"--plot {plot}: {error.strerror or error}") from error
        _tell(f"wrote {plot}")
    if any(one.errors for one in figures):
        raise typer.Exit(1)


def _measure(target: Target, loads: Sequence[Load], processes: int, warm_up: int) -> list[Figures]:
    """One run after the other, each a line of the table as soon as it is over."""
    from qvl.bench.load.figures import table_head, table_row
    from qvl.bench.load.run import measure

    print(table_head(), flush=True)
    figures = []
    for load in loads:
        figures.append(measure(target, load, processes=processes, warm_up=warm_up, tell=_tell))
        print(table_row(figures[-1]), flush=True)
        for doubt in figures[-1].doubts:
            _tell(f"{load.name}: {doubt}")
    return figures


def _record(url: str, target: Target, figures: Sequence[Figures]) -> dict[str, Any]:
    """Everything that makes the figures repeatable."""
    return {
        "bench": "serve",
        "url": url,
        "model": target.model,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"qvl": installed("qvl")},
        "options": target.options,
        "tokens_per_word": round(target.tokens_per_word, 4),
        "runs": [dataclasses.asdict(run) for run in figures],
    }


def _cases(name: str | None) -> list[Load]:
    if name is None:
        return [Load()]
    if name == SUITE:
        return list(CASES.values())
    if name not in CASES:
        raise ConfigError(
            f"no case is called '{name}'{suggest(name, [*CASES, SUITE])}; there are {', '.join([*CASES, SUITE])}"
        )
    return [CASES[name]]


def _sweep(loads: Sequence[Load], concurrencies: str | None, rates: str | None, *, given: bool) -> list[Load]:
    """The one case of `loads` at every level; `given`: a level was named beside them."""
    if len(loads) > 1:
        raise ConfigError("a sweep takes one case, not the suite")
    if concurrencies is not None and rates is not None:
        raise ConfigError("--sweep and --sweep-rates: a sweep goes over one of the two")
    if given:
        raise ConfigError("a sweep goes over concurrencies or rates itself: leave --concurrency and --rate out")
    if rates is not None:
        return cases.sweep(loads[0], rates=_numbers("--sweep-rates", rates, float))
    return cases.sweep(loads[0], concurrencies=_numbers("--sweep", concurrencies or "", int))


def _check_plot(path: Path | None) -> None:
    """What would keep the plot from being written should be known before the measurement."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {folder}")
    if path.is_dir() or path.suffix.lower() not in ("", ".png"):
        raise ConfigError(f"--plot {path}: name the file that the PNG goes into, such as load.png")


def _changed(load: Load, changes: dict[str, Any]) -> Load:
    """`load` with the given flags; one way to arrive takes the place of the other."""
    given = {name: value for name, value in changes.items() if value is not None}
    if "rate" in given:
        given["concurrency"] = None
    return dataclasses.replace(load, **given)


def _arrival(concurrency: int | None, rate: float | None) -> dict[str, Any]:
    if concurrency is not None and rate is not None:
        raise ConfigError("--concurrency and --rate: requests come one way or the other")
    return {"concurrency": concurrency, "rate": rate}


def _size(text: str | None) -> dict[str, int]:
    """ "640x480" -> width and height."""
    if text is None:
        return {}
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise ConfigError(
            f"--picture takes a size such as 1024x1024 (width x height), not '{text}'; --num-pictures 0 shows none"
        )
    return {"width": int(width), "height": int(height)}


def _numbers(flag: str, text: str, read: Callable[[str], T]) -> list[T]:
    try:
        return [read(item) for item in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} takes numbers such as 1,2,4,8, not '{text}'") from None


def _json_object(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError("--extra-body takes a JSON object")
    return value


def _tell(line: str) -> None:
    print(f"qvl: {line}", file=sys.stderr, flush=True)
