"""`qvl batch`: the flags, and who answers. The work itself is `qvl.batch`'s, which loads only for this command."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvl.cli import flags
from qvl.cli.tasks.flags import SERVER_PANEL, ApiKey, BaseUrl
from qvl.errors import ConfigError, QvlError
from qvl.types import DEFAULT_URL

if TYPE_CHECKING:
    from qvl.batch import Asker, BatchOptions, OpenAsker, Report, Source

OUTPUT_PANEL = "Output"
PACE_PANEL = "Pace"

# What a line of the user's own may name: his machine is no stranger to him.
_IN_PROCESS: dict[str, Any] = {"allow_any_local_path": True, "allow_private_hosts": True}
_MEDIA_LIMITS = ["image=999", "video=99"]


def batch(
    context: typer.Context,
    source: Annotated[
        Path, typer.Argument(metavar="FILE|FOLDER", help="OpenAI batch lines or plain bodies, or a folder of pictures.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Answers go here, one line each, in order.", rich_help_panel=OUTPUT_PANEL),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Asked about each picture of a folder: ocr, table, describe, solve, or translate (into English)."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same in your own words.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="For lines that do not say it.")] = None,
    temperature: Annotated[float | None, typer.Option(help="For lines that do not say it.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an earlier run ended.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="As --resume; ask failed lines again.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Throw earlier answers away.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one JSON object.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, no report.", rich_help_panel=OUTPUT_PANEL)
    ] = False,
    base_url: BaseUrl = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Load the model here, without a server.", rich_help_panel=SERVER_PANEL)
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name that the server serves, in place of those in the lines; or a checkpoint to load here "
            "[default: the lines' own, else the server's first, else demo]",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    api_key: ApiKey = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Requests under way, fewer only while the server is busy [default: as many as it gains from]",
            rich_help_panel=PACE_PANEL,
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="Further tries when an answer is lost or broken.", rich_help_panel=PACE_PANEL)
    ] = 3,
    patience: Annotated[
        float,
        typer.Option(
            min=0,
            help="Seconds without any answer, busy servers included, before giving up.",
            rich_help_panel=PACE_PANEL,
        ),
    ] = 600.0,
    timeout: Annotated[float, typer.Option(help="Seconds for one whole answer.", rich_help_panel=PACE_PANEL)] = 3600.0,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    load_format: flags.LoadFormat = "auto",
    quantization: flags.Quantization = None,
    num_threads: flags.NumThreads = None,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = 0.9,
    kv_cache_memory: flags.KvCacheMemory = None,
    mm_processor_kwargs: flags.ProcessorKwargs = None,
) -> int:
    """Answer every line of a file, or a question about every picture of a folder.

    `qvl batch jobs.jsonl -o answers.jsonl`, `qvl batch scans/ --task ocr -o text.jsonl`. Answers are kept as they come;
    after a crash `--resume` goes on, and every line is answered once. The flags below "Model" and "Memory" count where
    the model is loaded here. The exit code is 1 when a line failed.
    """
    source_of_url = context.get_parameter_source("base_url")
    if in_process and source_of_url is not None and source_of_url.name == "COMMANDLINE":  # not a variable
        raise ConfigError("--in-process and --base-url exclude each other")
    from qvl.batch import BatchOptions, Defaults

    own = {"max_tokens": max_tokens, "temperature": temperature}
    given = {name: value for name, value in own.items() if value is not None}
    lines = _source(source, output, task, prompt, given)
    engine = {
        "device": device,
        "dtype": dtype,
        "load_format": load_format,
        "quantization": quantization,
        "num_threads": num_threads,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "gpu_memory_utilization": gpu_memory_utilization,
        "kv_cache_memory": kv_cache_memory,
        "mm_processor_kwargs": mm_processor_kwargs,
    }
    options = BatchOptions(
        concurrency=concurrency,
        retries=retries,
        patience=patience,
        resume=resume,
        overwrite=overwrite,
        retry_failed=retry_failed,
        defaults=Defaults(model, given),
    )

    async def open_asker() -> Asker:
        if in_process:
            return await _load(model, engine, quiet)
        if base_url is not None:
            return await over_http.connect(base_url, model=model, api_key=api_key, timeout=timeout)
        found = await over_http.probe(DEFAULT_URL, model=model, api_key=api_key, timeout=timeout)
        return found or await _load(model, engine, quiet)

    from qvl.batch import over_http

    report = _run(lines, output, open_asker, options, quiet)
    if as_json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    elif not quiet:
        for line in report.lines():
            _tell(line)
    return 1 if report.any_failed else 0


def _source(source: Path, output: Path, task: str | None, prompt: str | None, given: dict[str, Any]) -> Source:
    """The lines to answer. Raises `ConfigError` for flags that do not fit."""
    from qvl.batch import JsonLines, Pictures
    from qvl.tasks import registry

    if task is not None and prompt is not None:
        raise ConfigError("--task and --prompt exclude each other")
    if not source.is_dir():
        if task is not None or prompt is not None:
            raise ConfigError(f"--task and --prompt are for a folder of pictures, and {source} is none")
        if source.exists() and output.exists() and source.samefile(output):
            raise ConfigError("the answers cannot go into the file of the requests")
        return JsonLines(source)
    if prompt is None and task is None:
        raise ConfigError(f"a folder needs --task NAME (NAME is one of {', '.join(registry.TASKS)}), or --prompt TEXT")
    asked, fields = (prompt, {}) if prompt is not None else registry.question(task or "")
    return Pictures(source, asked, {**fields, **given})


def _run(source: Source, output: Path, open_asker: OpenAsker, options: BatchOptions, quiet: bool) -> Report:
    """The whole batch; when it ends early, how to go on is said."""
    import uvloop

    from qvl.batch import run_batch
    from qvl.batch.progress import progress

    part = output.with_name(output.name + ".part")
    try:
        with progress(quiet=quiet) as show:
            return uvloop.run(run_batch(source, output, open_asker, options, show=show, tell=_tell))
    except (KeyboardInterrupt, QvlError) as error:
        if part.exists() and not isinstance(error, ConfigError):
            _tell(f"the answers so far are in {part}; the same command with --resume goes on")
        raise


async def _load(model: str | None, engine: dict[str, Any], quiet: bool) -> Asker:
    """The model in an engine process of our own."""
    from qvl.backends.local import LocalBackend
    from qvl.batch.in_process import BackendAsker

    name = model or "demo"
    if not quiet:
        _tell(f"loading {name} here")
    given = {**engine, **_IN_PROCESS, "model": name, "limit_mm_per_prompt": _MEDIA_LIMITS}
    backend = LocalBackend(flags.engine_options(given))
    await backend.start()
    return BackendAsker(backend, f"{name} in process")


def _tell(line: str) -> None:
    print(f"qvl: {line}", file=sys.stderr, flush=True)
