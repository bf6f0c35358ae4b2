"""What the words of an option come to on a device and for a checkpoint, or why they cannot: "auto", "half", a folder.

Every function raises `ConfigError` in words for the person who typed the option. Knows no sizes of memory, and does not
import torch: what is known about the device comes as `DeviceFacts`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvl.engine.options import EngineOptions
from qvl.errors import ConfigError
from qvl.media.fetch import MediaPolicy
from qvl.specs import ModelSpec

BF16_CAPABILITY = (8, 0)
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What must be known about a device before anything is loaded.

    `capability` is (0, 0) for a CPU. `total_memory` in bytes: of the GPU, or what this process may still take on a CPU
    (`engine.host_memory`). `preferred_cpu_dtype` is the faster of float32 and bfloat16 on this CPU.
    """

    kind: Literal["cpu", "cuda"]
    capability: tuple[int, int]
    total_memory: int
    preferred_cpu_dtype: str
    num_cores: int


def device_of(asked: str, facts: DeviceFacts) -> Literal["cpu", "cuda"]:
    if asked not in ("auto", facts.kind):
        has = "no CUDA GPU was found" if facts.kind == "cpu" else "the engine was told about a GPU"
        raise ConfigError(f"'device' is '{asked}', but {has}", param="device")
    return facts.kind


def dtype_of(asked: str, facts: DeviceFacts) -> str:
    if facts.kind == "cpu":
        return facts.preferred_cpu_dtype if asked == "auto" else asked
    has_bf16 = facts.capability >= BF16_CAPABILITY
    if asked == "bfloat16" and not has_bf16:
        have = ".".join(map(str, facts.capability))
        raise ConfigError(
            f"'dtype' bfloat16 needs compute capability 8.0, this GPU has {have}; use --dtype half", param="dtype"
        )
    return asked if asked != "auto" else "bfloat16" if has_bf16 else "float16"


def quantization_of(asked: str | None, facts: DeviceFacts, dtype: str) -> str:
    have = ".".join(map(str, facts.capability))
    problem = None
    if asked in ("int8", "int4") and facts.kind != "cpu":
        problem = "runs on a CPU only in this version of qvl; leave it out, or use --device cpu"
    elif asked == "fp8" and facts.kind == "cpu":
        problem = "needs a GPU with fp8 instructions; on a CPU there are int8 and int4"
    elif asked == "fp8" and facts.capability < FP8_CAPABILITY:
        problem = f"needs compute capability 8.9 or newer (Ada, Hopper, Blackwell), this GPU has {have}; leave it out"
    elif asked == "fp8" and dtype != "bfloat16":
        problem = f"works beside bfloat16 only, not {dtype}; leave --dtype out"
    if problem is not None:
        raise ConfigError(f"'quantization' {asked} {problem}", param="quantization")
    return asked or "none"


def length_of(options: EngineOptions, spec: ModelSpec) -> int:
    longest = spec.text.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ConfigError(
            f"'max_model_len' is {options.max_model_len}, but the checkpoint was trained for {longest} positions",
            param="max_model_len",
        )
    return options.max_model_len or longest


def policy_of(options: EngineOptions) -> MediaPolicy:
    """The fetcher's own defaults, except for what the user set."""
    root = options.allowed_local_media_path
    if root is not None and not Path(root).expanduser().is_dir():
        raise ConfigError(f"'allowed_local_media_path' is no folder: {root}", param="allowed_local_media_path")
    policy = MediaPolicy(
        allow_private_hosts=options.allow_private_hosts,
        allow_any_local_path=options.allow_any_local_path,
        allowed_local_path=Path(root).expanduser().resolve() if root is not None else None,
    )
    return dataclasses.replace(
        policy,
        max_bytes=options.max_media_bytes or policy.max_bytes,
        max_image_pixels=options.max_image_pixels or policy.max_image_pixels,
    )


def name_of(model: str, spec: ModelSpec) -> str:
    """What clients call the model: the name the user wrote; for a path its last part."""
    is_path = model.startswith((".", "/", "~")) or Path(model).expanduser().is_dir()
    return spec.name if is_path else model
