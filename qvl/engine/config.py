"""Every number of an engine, resolved once: the user's options + the checkpoint + facts about the device.

Knows the defaults and why they are what they are; what words such as "auto" come to stands in `choices`. Does not
import torch: what is known about the device comes as `DeviceFacts`. One number may stay open, `num_blocks` on a GPU:
the runner measures it and calls `with_kv_memory`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from qvl.engine.choices import DeviceFacts, device_of, dtype_of, length_of, name_of, policy_of, quantization_of
from qvl.engine.locate import find_model
from qvl.engine.options import EngineOptions
from qvl.errors import ConfigError
from qvl.media.fetch import MediaPolicy
from qvl.specs import ModelSpec, load_spec
from qvl.types import PictureRule, PixelLimits

__all__ = ["DeviceFacts", "EngineConfig", "EngineOptions", "resolve"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Bits of a weight with its part of a scale: in the decoder's layers, and in the vision tower and the head.
QUANTISED_BITS = {"int8": (8.0, 8.0), "int4": (4.125, 8.0), "fp8": (8.0, 16.0)}
GIB = 1 << 30
# What a GPU step needs beside weights and KV cache; only for the estimate before anything is loaded.
GPU_WORK_BYTES = 3 * GIB // 2
CPU_KV_BYTES = 4 * GIB
SMALLEST_DEFAULT_LEN = 4096
ENCODER_CACHE_BYTES = {"cpu": GIB // 4, "cuda": GIB // 8}
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}
# More at once leaves more steps without prompts, in which answers cost the most: see docs/performance.md.
MIXED_TOKENS = {"cpu": 2048, "cuda": 768}
NUM_SEQS = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """A resolved engine. Sizes in bytes or tokens as named; nothing is None but `num_blocks` before it was measured.

    `max_model_len_given`: the user asked for it, so it is never lowered in silence. `limits` are the pixel defaults of
    every picture and video. `encoder_budget_tokens` are vision tokens encoded per step, `max_num_mixed_tokens` bounds
    them and all tokens of a step that also decodes. `async_scheduling`: a step is launched before the last one ends.
    """

    spec: ModelSpec
    served_name: str
    device: Literal["cpu", "cuda"]
    dtype: str
    quantization: str
    attention_backend: str
    load_format: str
    max_model_len: int
    max_model_len_given: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int
    block_size: int
    num_blocks: int | None
    enable_prefix_caching: bool
    gpu_memory_utilization: float
    kv_cache_memory: int
    encoder_cache_bytes: int
    encoder_budget_tokens: int
    limit_mm_per_prompt: Mapping[str, int]
    limits: PixelLimits
    enforce_eager: bool
    async_scheduling: bool
    num_threads: int
    seed: int
    policy: MediaPolicy

    @property
    def precision(self) -> str:
        """What the weights are held in: "bfloat16", or "int8 (rest bfloat16)"."""
        return self.dtype if self.quantization == "none" else f"{self.quantization} (rest {self.dtype})"

    @property
    def picture_rule(self) -> PictureRule | None:
        """How pictures are seen whose requests say nothing about it; None where these options change that."""
        if self.limits != PixelLimits():
            return None
        spec = self.spec.processor
        return PictureRule(spec.factor, spec.min_pixels, spec.max_pixels)

    @property
    def weight_bytes(self) -> int:
        """All weights once they are loaded."""
        plain = DTYPE_BYTES[self.dtype]
        if self.quantization == "none":
            return self.spec.weight_bytes(plain)
        return self.spec.quantised_weight_bytes(*QUANTISED_BITS[self.quantization], plain)

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        return self.block_size * self.spec.kv_bytes_per_token(DTYPE_BYTES[self.dtype])

    @property
    def embedding_bytes_per_token(self) -> int:
        """One vision token in the encoder cache: in the dtype of activations, which is fp32 on a CPU."""
        return self.spec.text.hidden_size * (4 if self.device == "cpu" else DTYPE_BYTES[self.dtype])

    def with_kv_memory(self, num_bytes: int) -> EngineConfig:
        """This config with as many blocks as `num_bytes` hold, unless `num_blocks` is already set.

        A defaulted `max_model_len` is lowered to what fits. Raises `ConfigError` when a given one does not fit.
        """
        num_blocks = num_bytes // self.block_bytes if self.num_blocks is None else self.num_blocks
        room = num_blocks * self.block_size
        if room < 1 or (room < self.max_model_len and self.max_model_len_given):
            needed = -(-self.max_model_len // self.block_size) * self.block_bytes
            raise ConfigError(
                f"the KV cache holds {room} tokens ({_gib(num_blocks * self.block_bytes)}), but one request of "
                f"max_model_len {self.max_model_len} needs {_gib(needed)}; {self._remedy(room)}",
                param="max_model_len",
            )
        memory = num_blocks * self.block_bytes
        longest = min(self.max_model_len, room)
        return dataclasses.replace(self, num_blocks=num_blocks, kv_cache_memory=memory, max_model_len=longest)

    def _remedy(self, room: int) -> str:
        more = "--kv-cache-memory" if self.device == "cpu" else "--gpu-memory-utilization"
        return f"raise {more}" + (f", or lower --max-model-len to {room}" if room else "")

    def to_json(self) -> str:
        """For another process; `from_json` is the inverse."""
        return msgspec.json.encode(self, enc_hook=_path_to_text).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineConfig:
        return msgspec.json.decode(text, type=cls, dec_hook=_text_to_path)


def resolve(options: EngineOptions, facts: DeviceFacts) -> EngineConfig:
    """Fill every number. Raises `ConfigError` (`CheckpointError` for the folder) in words for the person who typed it.

    On a CPU `num_blocks` is computed here; on a GPU it stays None until the runner has measured, unless it was given or
    follows from a given `kv_cache_memory`.
    """
    spec = load_spec(find_model(options.model))
    device = device_of(options.device, facts)
    dtype = dtype_of(options.dtype, facts)
    batched = options.max_num_batched_tokens or BATCHED_TOKENS[device]
    config = EngineConfig(
        spec=spec,
        served_name=options.served_model_name or name_of(options.model, spec),
        device=device,
        dtype=dtype,
        quantization=quantization_of(options.quantization, facts, dtype),
        attention_backend=options.attention_backend,
        load_format=options.load_format,
        max_model_len=length_of(options, spec),
        max_model_len_given=options.max_model_len is not None,
        max_num_seqs=_num_seqs(options, batched, device),
        max_num_batched_tokens=batched,
        max_num_mixed_tokens=min(batched, options.max_num_mixed_tokens or MIXED_TOKENS[device]),
        block_size=options.block_size,
        num_blocks=options.num_blocks,
        enable_prefix_caching=options.enable_prefix_caching,
        gpu_memory_utilization=options.gpu_memory_utilization,
        kv_cache_memory=0,
        encoder_cache_bytes=options.encoder_cache_memory or ENCODER_CACHE_BYTES[device],
        encoder_budget_tokens=options.encoder_budget_tokens or batched,
        limit_mm_per_prompt=dict(options.limit_mm_per_prompt),
        limits=PixelLimits(**options.mm_processor_kwargs),  # type: ignore[arg-type]  # options checked whole numbers
        enforce_eager=options.enforce_eager,
        async_scheduling=device == "cuda" if options.async_scheduling is None else options.async_scheduling,
        num_threads=options.num_threads or facts.num_cores,
        seed=options.seed,
        policy=policy_of(options),
    )
    _check_kv_memory(config, options, facts.total_memory)
    if device == "cpu":
        return config.with_kv_memory(_cpu_kv_bytes(config, options.kv_cache_memory, facts.total_memory))
    _check_gpu(config, facts.total_memory)
    return config if options.kv_cache_memory is None else config.with_kv_memory(options.kv_cache_memory)


def _num_seqs(options: EngineOptions, batched: int, device: str) -> int:
    if options.max_num_seqs is not None and options.max_num_seqs > batched:
        raise ConfigError(
            f"'max_num_seqs' ({options.max_num_seqs}) is above 'max_num_batched_tokens' ({batched}), but every running "
            f"request needs one token of a step",
            param="max_num_seqs",
        )
    return options.max_num_seqs or min(NUM_SEQS[device], batched)


def _check_kv_memory(config: EngineConfig, options: EngineOptions, total: int) -> None:
    """What was asked for must fit beside the weights, before anything is loaded."""
    by_blocks = options.num_blocks is not None
    asked = config.block_bytes * options.num_blocks if options.num_blocks is not None else options.kv_cache_memory
    left = total - config.weight_bytes
    if asked is not None and asked > max(0, left):
        name = "num_blocks" if by_blocks else "kv_cache_memory"
        where = "GPU" if config.device == "cuda" else "machine"
        raise ConfigError(
            f"'{name}' asks for {_gib(asked)} of keys and values, but beside the weights ({_gib(config.weight_bytes)}) "
            f"this {where} has {_gib(max(0, left))}; give it less",
            param=name,
        )


def _cpu_kv_bytes(config: EngineConfig, asked: int | None, available: int) -> int:
    """Bytes for the KV cache: what was asked, else a quarter of the memory beside the weights, up to 4 GiB.

    The default never is less than one full-length request (of the length the user gave, else of a modest one), nor more
    than all sequences at full length can use.
    """
    if asked is not None:
        return asked
    least = config.max_model_len if config.max_model_len_given else min(config.max_model_len, SMALLEST_DEFAULT_LEN)
    one = -(-least // config.block_size) * config.block_bytes
    every = config.max_num_seqs * -(-config.max_model_len // config.block_size) * config.block_bytes
    return max(one, min(CPU_KV_BYTES, (available - config.weight_bytes) // 4, every))


def _check_gpu(config: EngineConfig, total: int) -> None:
    """Arithmetic before loading: refuse what cannot fit; the runner measures the rest."""
    weights = config.weight_bytes
    usable = int(total * config.gpu_memory_utilization)
    if weights + config.block_bytes > usable:
        raise ConfigError(
            f"the weights take {_gib(weights)} in {config.dtype}, but gpu_memory_utilization "
            f"{config.gpu_memory_utilization:g} of {_gib(total)} leaves {_gib(usable)}",
            param="gpu_memory_utilization",
        )
    work = min(GPU_WORK_BYTES, (usable - weights) // 4)
    config.with_kv_memory(usable - weights - work)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f} GiB"


def _path_to_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a config")


def _text_to_path(kind: type, value: Any) -> Any:
    if issubclass(kind, Path):
        return Path(value)
    raise TypeError(f"{kind.__name__} has no place in a config")
