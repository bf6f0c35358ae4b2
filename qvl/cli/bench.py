"""`qvl bench`: the figures of this machine. Knows flags and printing; the measuring is in `qvl.bench`.

`qvl bench serve`, `beside` and `kernels` have files of their own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import bench_beside, bench_kernels, bench_serve, flags
from qvl.cli.group import Commands
from qvl.cli.version import installed
from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.bench.measure import Figures, Subject, Workload
    from qvl.engine.config import EngineConfig
    from qvl.specs import ProcessorSpec

PEERS = ("transformers", "unquantised", "limit")
MILLI = 1000.0
AROUND_PICTURE = 64  # tokens, and more than it takes
BATCHES = "1,8,64,256"

app = typer.Typer(cls=Commands, help="Measure this machine, or a server.")
app.command("serve")(bench_serve.serve)
app.command("beside")(bench_beside.beside)
app.command("kernels")(bench_kernels.kernels)


@app.command("shape")
def shape(
    name: Annotated[str, typer.Argument(help="2b, 7b or 72b.")],
    folder: Annotated[Path, typer.Argument(help="Where to write it.")],
) -> None:
    """Write a folder with the shape of a published Qwen2-VL and a tokenizer of its size, for --load-format dummy."""
    from qvl.bench.shape import write_shape

    print(write_shape(name, folder))


@app.command("engine")
def engine(
    model: flags.Model = "demo",
    against: Annotated[
        str | None,
        typer.Option(
            help="Measure this beside qvl, in the same process: transformers, unquantised (qvl in 16 bits), or limit "
            "(what a CPU's bandwidth and rate of arithmetic allow in 16 bits)."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the text prompt.")] = 96,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated after it.")] = 32,
    picture: Annotated[str, typer.Option(metavar="WxH", help="Size of the picture, or none.")] = "448x448",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, after one that does not.")] = 3,
    streams: Annotated[int, typer.Option(min=1, help="Measure the steps of so many text prompts at once, too.")] = 1,
    stages: Annotated[
        bool, typer.Option("--stages", help="Say where the time goes instead: pictures, prompts, steps, choices, host.")
    ] = False,
    batches: Annotated[
        str | None, typer.Option(help=f"With --stages: answers that are continued at a time [default: {BATCHES}]")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: all cores]")] = None,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    load_format: flags.LoadFormat = "auto",
    quantization: flags.Quantization = None,
    attention_backend: flags.AttentionBackend = "auto",
) -> None:
    """Measure prefill, time per token and the first token after a picture, without a server.

    Every round gives qvl and its peer the same fresh prompts, one after the other. The last line is one JSON object.
    """
    if against is not None and against not in PEERS:
        raise ConfigError(f"--against knows {', '.join(PEERS)}, not '{against}'")
    if against == "unquantised" and quantization is None:
        raise ConfigError("--against unquantised compares with --quantization int8 or int4: name one")
    if stages and against is not None:
        raise ConfigError("--stages measures qvl alone: leave --against out")
    if batches is not None and not stages:
        raise ConfigError("--batches goes with --stages; --streams is for steps of several prompts without it")
    from qvl.bench.measure import Workload

    size = bench_beside.picture_size(picture)
    height_first = None if size is None else (size[1], size[0])
    workload = Workload(prompt_tokens, output_tokens, height_first, repeats, streams=streams)
    given = {"model": model, "device": device, "dtype": dtype, "load_format": load_format, "quantization": quantization}
    given["attention_backend"] = attention_backend
    if stages:
        _print_stages(given, workload, threads, batches or BATCHES)
        return
    config = _config(given, workload, threads)
    figures = _run(config, workload, against)
    _print_table(figures)
    print(json.dumps(_record(config, workload, figures)))


def _config(given: dict[str, Any], workload: Workload, threads: int | None) -> EngineConfig:
    """An engine just large enough for this workload."""
    from qvl.engine.config import resolve
    from qvl.engine.device import read_facts
    from qvl.engine.locate import find_model
    from qvl.specs import load_spec

    spec = load_spec(find_model(given["model"]))
    longest, most = longest_request(workload, spec.processor), spec.text.max_position_embeddings
    if longest > most:
        raise ConfigError(f"this takes {longest:,} tokens in one request, and the checkpoint was trained for {most:,}")
    options = flags.engine_options(
        {**given, "num_threads": threads, "max_num_seqs": workload.streams, "max_model_len": longest}
    )
    return resolve(options, read_facts(options.device))


def longest_request(workload: Workload, processor: ProcessorSpec) -> int:
    """Tokens of the longest prompt with its answer; a large picture is shown as large as the checkpoint takes it."""
    from qvl.media.sizes import picture_size
    from qvl.types import PixelLimits

    text = workload.prompt_tokens + workload.output_tokens
    if workload.picture is None:
        return text
    height, width = picture_size(*workload.picture, processor, PixelLimits())
    return max(text, AROUND_PICTURE + height * width // processor.factor**2)


def _run(config: EngineConfig, workload: Workload, against: str | None) -> dict[str, Figures]:
    from qvl.bench.measure import measure
    from qvl.bench.ours import QvlSubject

    usable = _usable_ids(config)
    _tell(f"loading {config.spec.name} ({config.precision}, {config.device}, {config.num_threads} threads)")
    ours = QvlSubject(config, "qvl" if config.quantization == "none" else f"qvl {config.quantization}")
    _tell(f"attention: {ours.engine.runner.model.attention_reason}")
    _tell(f"matrices: {ours.engine.runner.model.linear_reason}")
    subjects: list[Subject] = [ours]
    if against is not None:
        _tell(f"preparing {against}")
        peers = {"transformers": _peer, "unquantised": _unquantised, "limit": _limit}
        subjects.append(peers[against](config))
    return measure(subjects, workload, usable, _tell)


def _print_stages(given: dict[str, Any], workload: Workload, threads: int | None, batches: str) -> None:
    """A table of stages, and the same as one JSON object."""
    from qvl.bench.stages import STEPS, Stages

    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", batches) is None:
        raise ConfigError(f"--batches takes numbers such as 1,8,64, not '{batches}'")
    sizes = [int(item) for item in batches.split(",")]
    rounds = max(sizes) * (1 + workload.prompt_tokens // 256)  # steps until the last answer has begun, and some more
    most = dataclasses.replace(workload, streams=max(sizes), output_tokens=STEPS + rounds + 64)
    config = _config(given, most, threads)
    lines = Stages(config, workload, _usable_ids(config), _tell).measure(sizes)
    width = max(len(line.stage) for line in lines)
    for line in lines:
        print(f"{line.stage:<{width}}{line.ms:>12.3f} ms  {line.note}")
    record = _record(config, workload, {})
    record["bench"] = "stages"
    record["stages"] = [dataclasses.asdict(line) for line in lines]
    print(json.dumps(record))


def _usable_ids(config: EngineConfig) -> list[int]:
    """Ordinary tokens."""
    from qvl.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(config.spec.folder, config.spec.ids)
    known = min(tokenizer.vocab_size, config.spec.text.vocab_size)
    return [token_id for token_id in range(known) if token_id not in tokenizer.special_ids]


def _peer(config: EngineConfig) -> Subject:
    import torch

    from qvl.engine.device import DTYPES

    try:
        from qvl.bench.transformers_peer import TransformersSubject
    except ModuleNotFoundError as error:
        raise ConfigError(f"--against transformers: {error.name} is not installed here") from error
    where = torch.device(config.device)
    return TransformersSubject(
        config.spec, dtype=DTYPES[config.dtype], device=where, dummy=config.load_format == "dummy"
    )


def _limit(config: EngineConfig) -> Subject:
    from qvl.bench.cpu_limit import CpuLimit
    from qvl.engine.device import DTYPES

    if config.device != "cpu" or config.dtype == "float32":
        raise ConfigError("--against limit is for a CPU with 16-bit weights; `qvl bench kernels` knows a GPU's limits")
    return CpuLimit(config.spec, DTYPES[config.dtype])


def _unquantised(config: EngineConfig) -> Subject:
    from qvl.bench.ours import QvlSubject

    return QvlSubject(dataclasses.replace(config, quantization="none"), f"qvl {config.dtype}")


def _print_table(figures: dict[str, Figures]) -> None:
    from qvl.bench.measure import ratios

    names = list(figures)
    rows = {name: dataclasses.asdict(value) for name, value in figures.items()}
    print(
        f"{'median of':<16}" + "".join(f"{name:>24}" for name in names) + (f"{'qvl / peer':>14}" if names[1:] else "")
    )
    quotients = ratios(figures[names[0]], figures[names[1]]) if names[1:] else {}
    for field, label in (
        ("prefill", "prefill"),
        ("time_per_token", "time per token"),
        ("picture_ttft", "picture TTFT"),
        ("step_together", "step together"),
    ):
        if rows[names[0]][field] is None:
            continue
        cells = "".join(_cell(rows[name][field]) for name in names)
        quotient = quotients.get(field)
        print(f"{label:<16}{cells}" + ("" if quotient is None else f"{quotient:>14.2f}"))


def _cell(seconds: float | None) -> str:
    return f"{'-':>24}" if seconds is None else f"{seconds * MILLI:>21.1f} ms"


def _record(config: EngineConfig, workload: Workload, figures: dict[str, Figures]) -> dict[str, Any]:
    """Everything that makes the figures repeatable."""
    from qvl.bench.machine import describe

    return {
        "bench": "engine",
        "model": config.spec.name,
        "parameters": config.spec.num_parameters,
        "load_format": config.load_format,
        "device": config.device,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "threads": config.num_threads,
        "machine": describe(config.device),
        "versions": {name: installed(name) for name in ("qvl", "torch", "transformers")},
        "workload": dataclasses.asdict(workload),
        "seconds": {name: dataclasses.asdict(value) for name, value in figures.items()},
    }


def _tell(line: str) -> None:
    print(f"qvl: {line}", file=sys.stderr, flush=True)
