"""The flags that several commands share, each written once: name, help text, and the panel of the help page.

Knows how a flag is explained. Values stay texts here: `EngineOptions.from_dict` reads and checks them, so that the
command line, a file and `LLM(...)` accept the same spellings and complain in the same words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from qvl.engine.config import BATCHED_TOKENS, CPU_KV_BYTES, ENCODER_CACHE_BYTES, MIXED_TOKENS, NUM_SEQS
from qvl.engine.options import EngineOptions, parse_mm_limits
from qvl.media.fetch import MediaPolicy

GIB, MIB = 1 << 30, 1 << 20
POLICY = MediaPolicy()

MODEL_PANEL = "Model"
MEMORY_PANEL = "Memory and batching"
MEDIA_PANEL = "Pictures and videos"


def _by_device(sizes: Mapping[str, int], unit: int = 1, name: str = "") -> str:
    """The end of a help text: the default of each device."""
    return f"[default: {sizes['cpu'] // unit}{name} on a CPU, {sizes['cuda'] // unit}{name} on a GPU]"


_MODEL_HELP = "A checkpoint folder, or a name found in ./, ./models, $QVL_MODELS, ~/models or the Hugging Face cache."

Model: TypeAlias = Annotated[
    str, typer.Argument(metavar="[MODEL]", help=f"{_MODEL_HELP} 'demo' is the bundled checkpoint.")
]
Device: TypeAlias = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=MODEL_PANEL)]
Dtype: TypeAlias = Annotated[
    str,
    typer.Option(
        help="auto, half, float16, bfloat16 or float32. auto: bfloat16, float16 on GPUs before compute capability 8.0, "
        "on a CPU whichever of float32 and bfloat16 is faster there.",
        rich_help_panel=MODEL_PANEL,
    ),
]
LoadFormat: TypeAlias = Annotated[
    str,
    typer.Option(
        help="auto, safetensors, or dummy: random weights of the checkpoint's shape.", rich_help_panel=MODEL_PANEL
    ),
]
Quantization: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Round weights while loading: int8 (and activations) or int4 (the decoder's weights, the rest in 8 bits) "
        "on a CPU, fp8 (the decoder, and activations) on a GPU of compute capability 8.9 or newer [default: none]",
        rich_help_panel=MODEL_PANEL,
    ),
]
AttentionBackend: TypeAlias = Annotated[
    str,
    typer.Option(
        help="auto (the fastest that runs), triton (a GPU), sdpa (torch's operations, everywhere) or cpu (compiled).",
        rich_help_panel=MODEL_PANEL,
    ),
]
Seed: TypeAlias = Annotated[
    int, typer.Option(help="Makes requests without a seed of their own repeatable.", rich_help_panel=MODEL_PANEL)
]
NumThreads: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="CPU threads of the engine [default: OMP_NUM_THREADS, else all cores that it may use]",
        rich_help_panel=MODEL_PANEL,
    ),
]
TrustRemoteCode: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Accepted for the sake of old scripts, does nothing: qvl never runs code from a checkpoint.",
        rich_help_panel=MODEL_PANEL,
    ),
]
TensorParallel: TypeAlias = Annotated[
    int, typer.Option(help="Only 1 works in this version.", rich_help_panel=MODEL_PANEL)
]
PipelineParallel: TypeAlias = Annotated[
    int, typer.Option(help="Only 1 works in this version.", rich_help_panel=MODEL_PANEL)
]
MaxModelLen: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Longest request in tokens, prompt and answer together [default: the checkpoint's, as far as memory "
        "allows]",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MaxNumSeqs: TypeAlias = Annotated[
    str | None,
    typer.Option(help=f"Answers computed at once {_by_device(NUM_SEQS)}", rich_help_panel=MEMORY_PANEL),
]
MaxNumBatchedTokens: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Tokens computed in one step; longer prompts go in chunks {_by_device(BATCHED_TOKENS)}",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MaxNumMixedTokens: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Tokens of a step that computes prompts or pictures beside continuing answers: fewer keep answers "
        f"flowing, more bring first tokens sooner {_by_device(MIXED_TOKENS)}",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EnforceEager: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--enforce-eager",
        help="Record no CUDA graphs: ready a little sooner, slower while few answers are computed.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
AsyncScheduling: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Launch a step while the one before it still runs [default: on a GPU]",
        rich_help_panel=MEMORY_PANEL,
    ),
]
GpuMemoryUtilization: TypeAlias = Annotated[
    float,
    typer.Option(
        help="Part of the GPU's memory for weights, caches and activations together.", rich_help_panel=MEMORY_PANEL
    ),
]
KvCacheMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Size of the KV cache, such as 2GiB (a unit is a power of 1024) [default: measured on a GPU; "
        f"a quarter of the free memory, at most {CPU_KV_BYTES // GIB}GiB, on a CPU]",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EncoderCacheMemory: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Size of the cache of encoded pictures, such as 512MiB {_by_device(ENCODER_CACHE_BYTES, MIB, 'MiB')}",
        rich_help_panel=MEMORY_PANEL,
    ),
]
EncoderBudgetTokens: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Picture tokens encoded in one step [default: as --max-num-batched-tokens]", rich_help_panel=MEMORY_PANEL
    ),
]
BlockSize: TypeAlias = Annotated[
    int, typer.Option(help="Tokens in one block of the KV cache.", rich_help_panel=MEMORY_PANEL)
]
NumBlocks: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Blocks of the KV cache, instead of measuring what fits.", rich_help_panel=MEMORY_PANEL),
]
PrefixCaching: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        help="Keep the KV blocks of finished requests for others that begin with the same text and pictures.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
MediaLimits: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--limit-mm-per-prompt",
        metavar="KIND=N",
        help="Pictures and videos in one request: image=4, image=4,video=1 or a JSON object [default: image=4,video=1]",
        rich_help_panel=MEDIA_PANEL,
    ),
]
ProcessorKwargs: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--mm-processor-kwargs",
        metavar="JSON",
        help='Defaults for every picture: {"min_pixels": 3136, "max_pixels": 1003520}; fps and num_frames for videos.',
        rich_help_panel=MEDIA_PANEL,
    ),
]
AllowedLocalMedia: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--allowed-local-media-path",
        help="Requests may name pictures under this folder (file:// or a path) [default: none]",
        rich_help_panel=MEDIA_PANEL,
    ),
]
AllowPrivateHosts: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--allow-private-hosts",
        help="Fetch pictures from loopback, private and link-local addresses too: whoever can send requests then "
        "reaches what this machine reaches.",
        rich_help_panel=MEDIA_PANEL,
    ),
]
MaxMediaBytes: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Largest picture or video file, such as 64MiB [default: {POLICY.max_bytes // MIB}MiB]",
        rich_help_panel=MEDIA_PANEL,
    ),
]
MaxImagePixels: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help=f"Largest picture in pixels, checked before decoding [default: {POLICY.max_image_pixels}]",
        rich_help_panel=MEDIA_PANEL,
    ),
]


def engine_options(given: dict[str, Any]) -> EngineOptions:
    """The options of an engine from a command's parameters of the same names. Raises `ConfigError`."""
    limits: dict[str, int] = {}
    for text in given.get("limit_mm_per_prompt") or ():
        limits |= parse_mm_limits(text)
    return EngineOptions.from_dict({**given, "limit_mm_per_prompt": limits or None})
