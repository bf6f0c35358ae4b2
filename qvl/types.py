"""The words that every part shares: messages in, sampling rules, answers out. Plain frozen data, standard library only.

Knows the shapes. Does not know HTTP, torch, tokenizers or how anything is computed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from qvl.errors import InvalidRequest

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
MediaKind: TypeAlias = Literal["image", "video"]
FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]
ConstraintKind: TypeAlias = Literal["json_object", "json_schema", "regex", "grammar", "choice"]

DEFAULT_URL = "http://127.0.0.1:8000"  # where a server listens and a client asks, unless told otherwise
MAX_N = 64
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_CONSTRAINT_CHARS = 64 * 1024


@dataclass(frozen=True, slots=True)
class Grid:
    """A picture or video as the vision tower sees it, in patches: `t` temporal, `h` x `w` spatial."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        return self.t * self.h * self.w

    def num_tokens(self, merge_size: int) -> int:
        """Tokens in the prompt after `merge_size` x `merge_size` patches are merged into one."""
        return self.num_patches // (merge_size * merge_size)


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """What a request may say about the size of one picture or of a video; None keeps the server's value.

    `min_pixels` and `max_pixels` are areas in pixels (per frame for a video). `fps` is frames sampled per second of a
    video, `num_frames` an exact count instead, `total_pixels` an area that all frames of a video share.
    `resized_height` and `resized_width`, given together, are a size to use instead of the picture's own.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None

    def over(self, base: PixelLimits) -> PixelLimits:
        """These limits, with `base` where they are silent."""
        mine = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(base, **{name: value for name, value in mine.items() if value is not None})


@dataclass(frozen=True, slots=True)
class PictureRule:
    """How a model sees pictures: sides are multiples of `factor` pixels, the area is within the limits (pixels)."""

    factor: int
    min_pixels: int
    max_pixels: int


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text of a message. Control tokens typed into it are plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """A picture or video of a message.

    `source` is a URL, data URL or local path (str), bytes of a file, a `pathlib.Path`, a PIL picture, a uint8 array
    [h, w, 3] ([n, h, w, 3] for a video), or for a video a list or tuple of pictures (any of these) as its frames.
    """

    kind: MediaKind
    source: Any
    limits: PixelLimits = PixelLimits()


Part: TypeAlias = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[Part, ...]


def _check(ok: bool, param: str, says: str) -> None:
    if not ok:
        raise InvalidRequest(f"'{param}' must be {says}", param=param)


def check_api_key(key: str) -> None:
    """Raises `InvalidRequest` for a key that cannot be sent."""
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest("the API key has characters that no header carries; is there a line's end in it?")


def _whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)  # numpy's whole numbers too


def _finite(value: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like; only tokens that keep to it are chosen.

    `text` is a JSON schema as JSON, a regular expression (Rust's syntax) that matches the whole answer, a Lark grammar,
    or a JSON list of texts to choose from; it is empty for "json_object". `param` names the caller's field in errors.
    An answer cut by `max_tokens` or a stop string is the beginning of one that would have matched.
    """

    kind: ConstraintKind
    text: str = ""
    param: str = field(default="constraint", compare=False)

    def __post_init__(self) -> None:
        _check(self.kind in get_args(ConstraintKind), self.param, f"one of {', '.join(get_args(ConstraintKind))}")
        says = f"at most {MAX_CONSTRAINT_CHARS} characters"
        _check(isinstance(self.text, str) and len(self.text) <= MAX_CONSTRAINT_CHARS, self.param, says)
        _check(bool(self.text) or self.kind in ("json_object", "grammar", "regex"), self.param, "not empty")

    @classmethod
    def json(cls, schema: Any = None, *, param: str = "constraint") -> Constraint:
        """A JSON object; with a schema (a dict, its JSON, or a pydantic class) what that describes."""
        if schema is None:
            return cls("json_object", param=param)
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        return cls("json_schema", schema if isinstance(schema, str) else _as_json(schema, param), param)

    @classmethod
    def regex(cls, pattern: str, *, param: str = "constraint") -> Constraint:
        return cls("regex", pattern, param)

    @classmethod
    def grammar(cls, lark: str, *, param: str = "constraint") -> Constraint:
        return cls("grammar", lark, param)

    @classmethod
    def choice(cls, texts: Sequence[str], *, param: str = "constraint") -> Constraint:
        """Exactly one of `texts`."""
        listed = [] if isinstance(texts, str) else list(texts)
        _check(bool(listed) and all(isinstance(text, str) for text in listed), param, "a list of texts, not empty")
        return cls("choice", _as_json(listed, param), param)


def _as_json(value: Any, param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"'{param}' must be plain JSON, not nested beyond all bounds", param=param) from error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to stop. None means "the checkpoint's generation_config, else the neutral value".

    `logprobs`: None for none, else how many alternatives (0 to 20) beside the chosen token's own log-probability.
    `logit_bias` maps token ids to values added to the logits. The same `seed` gives the same text, whatever else runs.
    Raises `InvalidRequest` naming the field when a value is out of range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", self.logit_bias or {})
        self._check_lengths()
        self._check_probabilities()
        self._check_lists()
        _check(self.constraint is None or isinstance(self.constraint, Constraint), "constraint", "a Constraint")

    def _check_lengths(self) -> None:
        for name in ("max_tokens", "top_k", "seed", "logprobs"):
            value = getattr(self, name)
            _check(value is None or _whole(value), name, "a whole number")
        for name in ("min_tokens", "n"):
            _check(_whole(getattr(self, name)), name, "a whole number")
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        _check(self.min_tokens >= 0, "min_tokens", "at least 0")
        if self.max_tokens is not None:
            _check(self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        _check(1 <= self.n <= MAX_N, "n", f"from 1 to {MAX_N}")
        _check(self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, "top_logprobs", f"from 0 to {MAX_LOGPROBS}")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")

    def _check_probabilities(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, 100.0),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 100.0),
            ("presence_penalty", -2.0, 2.0),
            ("frequency_penalty", -2.0, 2.0),
        ):
            value = getattr(self, name)
            says = f"a number from {low:g} to {high:g}"
            _check(value is None or (_finite(value) and low <= value <= high), name, says)
        _check(self.top_p is None or self.top_p > 0, "top_p", "above 0 and at most 1")
        _check(self.top_k is None or self.top_k >= -1, "top_k", "at least 1, or 0 or -1 for no limit")

    def _check_lists(self) -> None:
        _check(len(self.stop) <= MAX_STOP_STRINGS, "stop", f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            _check(
                isinstance(text, str) and 0 < len(text) <= MAX_STOP_CHARS,
                "stop",
                f"strings of 1 to {MAX_STOP_CHARS} characters",
            )
        _check(len(self.stop_token_ids) <= 1024, "stop_token_ids", "at most 1024 ids")
        _check(len(self.logit_bias) <= 1024, "logit_bias", "at most 1024 entries")
        for value in self.logit_bias.values():
            _check(_finite(value) and -100 <= value <= 100, "logit_bias", "numbers from -100 to 100")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat completion, free of any wire format."""

    messages: tuple[Message, ...]
    sampling: SamplingParams = SamplingParams()
    limits: PixelLimits = PixelLimits()
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_vision_id: bool = False
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One plain completion of a text or of token ids."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    echo: bool = False
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability (natural, temperature 1, no filtering) of a chosen token, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts of a whole request (all of its `n` answers together)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one answer gained in one step. `usage` is the running total of the request.

    `index` says which of the `n` answers; `text` never ends in half a character and never holds part of a stop string.
    The last delta of an answer carries `finish_reason`; `stop_reason` is the stop string or token id that ended it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage = Usage()


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All `n` answers to one request; `text` is the first one's."""

    answers: tuple[Answer, ...]
    usage: Usage

    @property
    def text(self) -> str:
        return self.answers[0].text
