"""`qvl check`: what would run here and why, and whether a checkpoint folder can be loaded, without loading it.

Knows which questions a user has before starting a server. Every answer comes from the code that would decide it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from qvl.cli import flags
from qvl.cli.version import installed
from qvl.errors import CheckpointError, InvalidRequest
from qvl.types import MediaPart, Message, TextPart

if TYPE_CHECKING:
    from qvl.engine.config import DeviceFacts, EngineConfig
    from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from qvl.tokenizer import Tokenizer

GIB = 1 << 30


def check(
    model: flags.Model = "demo",
    device: flags.Device = "auto",
    dtype: flags.Dtype = "auto",
    load_format: flags.LoadFormat = "auto",
    quantization: flags.Quantization = None,
    attention_backend: flags.AttentionBackend = "auto",
    max_model_len: flags.MaxModelLen = None,
    gpu_memory_utilization: flags.GpuMemoryUtilization = 0.9,
    kv_cache_memory: flags.KvCacheMemory = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing when all is well.")] = False,
) -> None:
    """Say which device, precision and kernels would be used and why, and whether the checkpoint can be loaded."""
    options = flags.engine_options(
        {
            "model": model,
            "device": device,
            "dtype": dtype,
            "load_format": load_format,
            "quantization": quantization,
            "attention_backend": attention_backend,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_memory": kv_cache_memory,
        }
    )
    from qvl.engine.config import resolve
    from qvl.engine.device import read_facts

    facts = read_facts(options.device)
    config = resolve(options, facts)
    network = _network(config)
    rows = [
        ("versions", _versions()),
        *_device_rows(config, facts, network, asked=options.dtype != "auto"),
        *_model_rows(config, network),
        *_memory_rows(config),
    ]
    if not quiet:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")


def _versions() -> str:
    return ", ".join(f"{name} {installed(name)}" for name in ("qvl", "torch", "tokenizers", "av"))


def _network(config: EngineConfig) -> Qwen2VLForConditionalGeneration:
    """The network without weights: it has chosen its kernels, and knows which tensors it needs."""
    import torch

    from qvl.engine.device import DTYPES
    from qvl.models.registry import build_model

    dtype, device = DTYPES[config.dtype], torch.device(config.device)
    return build_model(config.spec, dtype, device, config.quantization, config.attention_backend)


def _device_rows(
    config: EngineConfig, facts: DeviceFacts, network: Qwen2VLForConditionalGeneration, *, asked: bool
) -> list[tuple[str, str]]:
    from qvl.engine.device import device_name

    memory = f"{facts.total_memory / GIB:.1f} GiB {'free' if facts.kind == 'cpu' else 'in all'}"
    return [
        ("device", f"{device_name(network.device)}, {facts.num_cores} cores, {memory}"),
        ("dtype", f"{config.dtype}: {'as asked for' if asked else _dtype_reason(config, facts)}"),
        ("attention", network.attention_reason),
        ("in pictures", network.vision_reason),
        ("matrices", network.linear_reason),
        ("weights take", f"{config.weight_bytes / GIB:.2f} GiB in {config.precision}"),
    ]


def _dtype_reason(config: EngineConfig, facts: DeviceFacts) -> str:
    if config.device == "cuda":
        shown = ".".join(map(str, facts.capability))
        return f"compute capability {shown}, the checkpoint was saved in {config.spec.dtype}"
    return f"{facts.preferred_cpu_dtype} is the faster of float32 and bfloat16 on this CPU"


def _model_rows(config: EngineConfig, network: Qwen2VLForConditionalGeneration) -> list[tuple[str, str]]:
    """Raises `CheckpointError` when a tensor is missing, unexpected or misshapen, the vocabulary cannot be read, or
    the chat template cannot be rendered."""
    from qvl.tokenizer import Tokenizer

    spec = config.spec
    tokenizer = Tokenizer.from_folder(spec.folder, spec.ids)
    size = f"{spec.num_parameters / 1e6:,.1f} M parameters ({spec.vision_parameters / 1e6:,.1f} M of them vision)"
    return [
        ("checkpoint", f"{_shortened(str(spec.folder))}: {spec.architecture}, {size}"),
        ("weights", _weights_row(config, network)),
        ("tokenizer", f"{tokenizer.vocab_size} tokens; the model has {spec.text.vocab_size}"),
        ("chat template", _template_row(tokenizer)),
    ]


def _template_row(tokenizer: Tokenizer) -> str:
    """Renders what every user asks first. A template that cannot do that is read without complaint, and refuses each
    request afterwards."""
    from qvl.prompt import TextRun  # with numpy, which no other command should wait for

    text, picture = TextPart("What is this?"), MediaPart("image", None)
    for what, parts in (("a text", (text,)), ("a picture and a text", (picture, text))):
        try:
            pieces = tokenizer.chat([Message("user", parts)])
        except InvalidRequest as error:
            cause = error.__cause__
            why = f" ({type(cause).__name__}: {cause})" if cause is not None and str(cause) not in error.message else ""
            raise CheckpointError(f"no message of {what} can be asked: {error.message}{why}") from error
        if not any(isinstance(piece, TextRun) and text.text in piece.text for piece in pieces):
            raise CheckpointError(f"no message of {what} can be asked: the checkpoint's chat template drops the text")
    return "renders a text, and a picture with a text"


def _weights_row(config: EngineConfig, network: Qwen2VLForConditionalGeneration) -> str:
    if config.load_format == "dummy":
        return "dummy: random numbers of the right shapes, no file is read"
    from contextlib import ExitStack

    from qvl.models.safetensors_file import SafetensorsFile
    from qvl.models.weights import expected_slots, match, rename, weight_files

    paths = weight_files(config.spec.folder)
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in paths]
        tied = config.spec.text.tie_word_embeddings
        sources = match(expected_slots(network), rename(files, network.RENAMES), tied=tied)
    num_bytes = sum(path.stat().st_size for path in paths)
    size = f"{num_bytes / 1e6:,.1f} MB, saved in {config.spec.dtype}"
    return f"complete: {len(sources)} tensors in {len(paths)} file(s), {size}"


def _memory_rows(config: EngineConfig) -> list[tuple[str, str]]:
    if config.num_blocks is None:
        return [("kv cache", "measured after loading, from --gpu-memory-utilization")]
    tokens = config.num_blocks * config.block_size
    full = tokens / config.max_model_len
    memory = f"{config.kv_cache_memory / GIB:.2f} GiB"
    return [("kv cache", f"{tokens:,} tokens ({memory}): {full:.1f} requests of {config.max_model_len:,} tokens")]


def _shortened(path: str) -> str:
    home = os.path.expanduser("~")
    return f"~{path[len(home) :]}" if path.startswith(home + os.sep) else path
