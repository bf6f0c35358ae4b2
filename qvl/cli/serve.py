"""`qvl serve`: a checkpoint folder becomes an OpenAI-compatible server.

Knows the flags and the options they become. Does not know how to serve: that is `qvl.server.run` (one process for HTTP)
and `qvl.server.supervisor` (several).
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import typer

from qvl.cli import flags
from qvl.engine.locate import find_model
from qvl.engine.options import parse_bytes
from qvl.errors import ConfigError
from qvl.server.options import ServerOptions
from qvl.specs import load_spec

SERVER_PANEL = "Server"


def serve(
    model: flags.Model = "demo",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER_PANEL)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", rich_help_panel=SERVER_PANEL)] = 8000,
    api_server_count: Annotated[
        str,
        typer.Option(
            help="HTTP processes that share the address and the engine; auto: one, with a GPU one per four cores, at "
            "most four.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = "auto",
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name in requests and answers; further names stand after it or after the flag again "
            "[default: as MODEL is written]",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="QVL_API_KEY",
            help="Key that requests must carry; repeat it for several. The variable keeps it out of process lists.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Requests that may wait; above it callers get 429.", rich_help_panel=SERVER_PANEL)
    ] = 256,
    max_body_size: Annotated[
        str, typer.Option(help="Largest request body, such as 128MiB.", rich_help_panel=SERVER_PANEL)
    ] = "128MiB",
    drain_seconds: Annotated[
        float, typer.Option(help="Time that running requests get after SIGTERM.", rich_help_panel=SERVER_PANEL)
    ] = 30.0,
    overflow: Annotated[
        Literal["error", "window", "summary"],
        typer.Option(
            help="What becomes of a conversation that is too long for the model, where its request does not say: it is "
            "refused, it loses its oldest turns, or the model sums them up.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = "error",
    summary_seconds: Annotated[
        float,
        typer.Option(
            help="Time that summing up may take for one answer; above it the oldest turns are left out.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = 60.0,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web origin whose pages may call this server; repeatable.", rich_help_panel=SERVER_PANEL),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name under which a server on the loopback address without a key may be called, as by a proxy that "
            "passes its own on; repeatable, * for all.",
            rich_help_panel=SERVER_PANEL,
        ),
    ] = None,
    root_path: Annotated[
        str, typer.Option(help="Path prefix that a proxy in front strips off.", rich_help_panel=SERVER_PANEL)
    ] = "",
    log_level: Annotated[
        str, typer.Option(help="critical, error, warning, info or debug.", rich_help_panel=SERVER_PANEL)
    ] = "warning",
    access_log: Annotated[bool, typer.Option(help="Log every request.", rich_help_panel=SERVER_PANEL)] = False,
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    load_format: flags.LoadFormat = "auto",
    quantization: flags.Quantization = None,
    attention_backend: flags.AttentionBackend = "auto",
    seed: flags.Seed = 0,
    num_threads: flags.NumThreads = None,
    tensor_parallel_size: flags.TensorParallel = 1,
    pipeline_parallel_size: flags.PipelineParallel = 1,
    trust_remote_code: flags.TrustRemoteCode = False,
    max_model_len: flags.MaxModelLen = None,
    max_num_seqs: flags.MaxNumSeqs = None,
    max_num_batched_tokens: flags.MaxNumBatchedTokens = None,
    max_num_mixed_tokens: flags.MaxNumMixedTokens = None,
    enforce_eager: flags.EnforceEager = False,
    async_scheduling: flags.AsyncScheduling = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = 0.9,
    kv_cache_memory: flags.KvCacheMemory = None,
    encoder_cache_memory: flags.EncoderCacheMemory = None,
    encoder_budget_tokens: flags.EncoderBudgetTokens = None,
    block_size: flags.BlockSize = 16,
    num_blocks: flags.NumBlocks = None,
    enable_prefix_caching: flags.PrefixCaching = True,
    limit_mm_per_prompt: flags.MediaLimits = None,
    mm_processor_kwargs: flags.ProcessorKwargs = None,
    allowed_local_media_path: flags.AllowedLocalMedia = None,
    allow_private_hosts: flags.AllowPrivateHosts = False,
    max_media_bytes: flags.MaxMediaBytes = None,
    max_image_pixels: flags.MaxImagePixels = None,
) -> int:
    """Serve a checkpoint with an OpenAI-compatible API until told to stop (Ctrl-C or SIGTERM drains)."""
    names = tuple(served_model_name or ())
    options = flags.engine_options(
        {
            "model": model,
            "served_model_name": names[0] if names else None,
            "device": device,
            "dtype": dtype,
            "load_format": load_format,
            "quantization": quantization,
            "attention_backend": attention_backend,
            "seed": seed,
            "num_threads": num_threads,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "trust_remote_code": trust_remote_code,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_num_mixed_tokens": max_num_mixed_tokens,
            "enforce_eager": enforce_eager,
            "async_scheduling": async_scheduling,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory": kv_cache_memory,
            "encoder_cache_memory": encoder_cache_memory,
            "encoder_budget_tokens": encoder_budget_tokens,
            "block_size": block_size,
            "num_blocks": num_blocks,
            "enable_prefix_caching": enable_prefix_caching,
            "limit_mm_per_prompt": limit_mm_per_prompt,
            "mm_processor_kwargs": mm_processor_kwargs,
            "allowed_local_media_path": allowed_local_media_path,
            "allow_private_hosts": allow_private_hosts,
            "max_media_bytes": max_media_bytes,
            "max_image_pixels": max_image_pixels,
        }
    )
    if trust_remote_code:
        print("qvl: --trust-remote-code does nothing: no code from a checkpoint is ever run", file=sys.stderr)
    server = ServerOptions(
        host=host,
        port=port,
        api_keys=_keys(api_key or []),
        served_model_names=names,
        max_body_bytes=parse_bytes("max_body_size", max_body_size),
        max_queue=max_queue,
        drain_seconds=drain_seconds,
        overflow=overflow,
        summary_seconds=summary_seconds,
        cors_origins=tuple(cors_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        root_path=root_path,
        log_level=log_level,
        access_log=access_log,
    )
    load_spec(find_model(model))  # a folder that cannot be served is told before anything listens
    # The engine's words and the HTTP stack load only for this command, and only when all of that made sense.
    from qvl.server.start import process_count, start

    return start(server, options, process_count(api_server_count, device))


def _keys(keys: list[str]) -> tuple[str, ...]:
    """Printable ASCII only: a header carries nothing else, and a key with a stray newline would lock everybody out."""
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError("--api-key must be printable ASCII without spaces around it")
    return tuple(keys)
