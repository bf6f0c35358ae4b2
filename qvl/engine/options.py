"""What a user may set on an engine, in `LLM(...)`, on the command line or in a file: one frozen dataclass.

Knows names, types and ranges; every complaint names the option. Does not know the checkpoint or the device:
`config.resolve` turns options into numbers.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from qvl.errors import ConfigError, suggest

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"auto": "auto", "half": "float16", "float16": "float16", "bfloat16": "bfloat16"} | {
    "float": "float32",
    "float32": "float32",
}
QUANTIZATIONS = ("none", "int8", "int4", "fp8")
ATTENTION_BACKENDS = ("auto", "triton", "sdpa", "cpu")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
MEDIA_KINDS = ("image", "video")
PROCESSOR_KEYS = ("min_pixels", "max_pixels", "fps", "num_frames")
DEFAULT_MM_LIMITS = {"image": 4, "video": 1}
_COUNTS = (
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_num_mixed_tokens",
    "block_size",
    "num_blocks",
    "kv_cache_memory",
    "encoder_cache_memory",
    "encoder_budget_tokens",
    "num_threads",
    "max_media_bytes",
    "max_image_pixels",
)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _mm_defaults() -> dict[str, int]:
    return dict(DEFAULT_MM_LIMITS)


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine; names and meanings are vLLM's where it has them. None: `config.resolve` chooses.

    `model`: a checkpoint folder, a name found in the usual places (`locate.find_model`), or "demo", the bundled one.
    `kv_cache_memory`, `encoder_cache_memory`, `max_media_bytes` are bytes (texts like "2GiB" are read by `from_dict`).
    `gpu_memory_utilization` is the part of the GPU's memory that weights, caches and activations may use together.
    `quantization`: weights are rounded while they are loaded, to "int8" or "int4" on a CPU, to "fp8" on a GPU.
    `attention_backend` forces one; "auto" takes the fastest that runs.
    `limit_mm_per_prompt` counts pictures and videos of one request. `mm_processor_kwargs` (`min_pixels`, `max_pixels`,
    `fps`, `num_frames`) are the defaults of every picture and video. `num_blocks` overrides the measured KV cache size.
    `max_num_mixed_tokens` bounds the tokens of a step that computes prompts and continues answers, and its pictures'.
    `enforce_eager` leaves CUDA graphs out. `async_scheduling` plans and launches a step while the one before it still
    runs; None: on a GPU.
    `seed` makes requests without a seed of their own repeatable, given the same order of requests.
    `allow_any_local_path` lets requests name any file of this machine: for in-process use only.
    `trust_remote_code` is accepted and does nothing: qvl never runs code from a checkpoint.
    """

    model: str = "demo"
    served_model_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    quantization: str | None = None
    attention_backend: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_mixed_tokens: int | None = None
    block_size: int = 16
    num_blocks: int | None = None
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    kv_cache_memory: int | None = None
    encoder_cache_memory: int | None = None
    encoder_budget_tokens: int | None = None
    limit_mm_per_prompt: Mapping[str, int] = field(default_factory=_mm_defaults)
    mm_processor_kwargs: Mapping[str, int | float] = field(default_factory=dict)
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    num_threads: int | None = None
    seed: int = 0
    allowed_local_media_path: str | None = None
    allow_any_local_path: bool = False
    allow_private_hosts: bool = False
    max_media_bytes: int | None = None
    max_image_pixels: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit_mm_per_prompt", _mm_defaults() | dict(self.limit_mm_per_prompt))
        object.__setattr__(self, "dtype", DTYPES.get(self.dtype.removeprefix("torch."), self.dtype))
        self._check_words()
        self._check_numbers()
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) != 1:
                says = f"'{name}' is {getattr(self, name)}, but this version of qvl runs a model on one device"
                raise ConfigError(f"{says}; leave it at 1", param=name)

    def _check_words(self) -> None:
        _one_of("device", self.device, DEVICES)
        _one_of("dtype", self.dtype, tuple(DTYPES))
        _one_of("load_format", self.load_format, LOAD_FORMATS)
        _one_of("quantization", self.quantization or "none", QUANTIZATIONS)
        _one_of("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        for name in self.limit_mm_per_prompt:
            _known("limit_mm_per_prompt", name, MEDIA_KINDS)
        for name in self.mm_processor_kwargs:
            _known("mm_processor_kwargs", name, PROCESSOR_KEYS)

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            _require(value is None or (type(value) is int and value >= 1), name, "a whole number of at least 1", value)
        for kind, count in self.limit_mm_per_prompt.items():
            says = f"{kind}=N with N of at least 0"
            _require(type(count) is int and count >= 0, "limit_mm_per_prompt", says, count)
        for key, number in self.mm_processor_kwargs.items():
            good = isinstance(number, int | float) and math.isfinite(number) and number > 0
            if key == "fps":
                _require(good, "mm_processor_kwargs", "fps=N with N above 0", number)
            else:
                whole = good and isinstance(number, int)
                _require(whole, "mm_processor_kwargs", f"{key}=N with a whole N above 0", number)
        part = self.gpu_memory_utilization
        _require(0.0 < part <= 1.0, "gpu_memory_utilization", "above 0 and at most 1", part)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> EngineOptions:
        """Options from a command line or a file: texts become numbers, dashes in names count as underscores.

        None leaves the default. Raises `ConfigError` naming an unknown option (with the closest known one) or a bad
        value.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for key, value in options.items():
            name = key.strip().lstrip("-").replace("-", "_")
            if name not in fields:
                raise ConfigError(f"unknown option '{key}'{suggest(name, fields)}", param=key)
            if value is not None:
                values[name] = _convert(name, str(fields[name].type), value)
        return cls(**values)

    def to_json(self) -> str:
        """For another process; `from_json` is the inverse."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> EngineOptions:
        return msgspec.json.decode(text, type=cls)


def parse_mm_limits(text: str) -> dict[str, int]:
    """Counts of a text like `image=4,video=1` or `{"image": 4}`. Raises `ConfigError`."""
    return {kind: _integer("limit_mm_per_prompt", count) for kind, count in _pairs("limit_mm_per_prompt", text).items()}


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a text like "1073741824", "1g", "1GiB" or "512 MB" (powers of 1024). Raises `ConfigError`."""
    number = text.strip().lower().removesuffix("b").removesuffix("i").strip()
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        amount = float(number.removesuffix(unit)) * 1024 ** _UNITS[unit]
        return int(amount)
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"'{name}' must be a size like 2GiB or 500MB, not '{text}'", param=name) from None


def _convert(name: str, annotation: str, value: Any) -> Any:
    """`value` as the type of the field; texts are read, anything else must fit already."""
    if name in ("limit_mm_per_prompt", "mm_processor_kwargs"):
        return _convert_mapping(name, value)
    if annotation.startswith("str"):
        _require(isinstance(value, str) or hasattr(value, "__fspath__"), name, "a text", value)
        return str(value)
    if annotation.startswith("bool"):
        return _boolean(name, value)
    if annotation.startswith("float"):
        return _number(name, value)
    if isinstance(value, str) and name in ("kv_cache_memory", "encoder_cache_memory", "max_media_bytes"):
        return parse_bytes(name, value)
    return None if value == "auto" else _integer(name, value)


def _convert_mapping(name: str, value: Any) -> dict[str, int | float]:
    pairs = _pairs(name, value) if isinstance(value, str) else value
    _require(isinstance(pairs, Mapping), name, "key=value pairs or a JSON object", value)
    read: Callable[[str, Any], int | float] = _integer if name == "limit_mm_per_prompt" else _number_or_integer
    return {str(key): read(name, item) for key, item in pairs.items()}


def _pairs(name: str, text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigError(f"'{name}' is not valid JSON: {error}", param=name) from None
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    _require(all(equals for _, equals, _ in pairs), name, "written as image=4,video=1 or as a JSON object", text)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, str):
            return int(value)
        if isinstance(value, int | float) and not isinstance(value, bool) and int(value) == value:
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"'{name}' must be a whole number, not {value!r}", param=name)


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"'{name}' must be a number, not {value!r}", param=name)


def _number_or_integer(name: str, value: Any) -> float:
    number = _number(name, value)
    return int(number) if math.isfinite(number) and number == int(number) else number


def _boolean(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())
    if word is None:
        raise ConfigError(f"'{name}' must be true or false, not {value!r}", param=name)
    return word


def _require(ok: bool, name: str, says: str, value: Any) -> None:
    if not ok:
        raise ConfigError(f"'{name}' must be {says}, not {value!r}", param=name)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    _require(value in known, name, f"one of {', '.join(known)}", value)


def _known(name: str, key: str, known: tuple[str, ...]) -> None:
    if key not in known:
        raise ConfigError(f"'{name}' knows {', '.join(known)}, not '{key}'{suggest(key, known)}", param=name)
