"""The fields of a request: typed, bounded, and every one that this version cannot honour refused by name.

Knows field names and their neutral values (those that ask for nothing). Does not know messages or prompts.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qvl.errors import InvalidRequest, suggest
from qvl.types import Constraint, SamplingParams
from qvl.wire.responses import Options

_HUGE = 2**31 - 1

Count = Annotated[int, Field(ge=-_HUGE, le=_HUGE)]
TokenId = Annotated[int, Field(ge=0, le=_HUGE)]

# Accepted, whatever they hold: labels for the caller's own book-keeping, and switches without meaning for this family.
IGNORED = frozenset(
    ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "add_special_tokens")
)

# Accepted with these values, which ask for nothing; null always is. Anything else is refused by name.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "guided_decoding_backend": ("auto", "guidance"),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "media_io_kwargs": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "priority": (0,),
    "kv_transfer_params": (),
    "include_reasoning": (True, False),
    "enable_thinking": (False,),
    "thinking": ({"type": "disabled"},),
    "echo": (False,),
    "request_id": (),
    "vllm_xargs": ({},),
    "moderation": (),
}

# What to do instead, where that is more than leaving the field out.
_INSTEAD: Mapping[str, str] = {
    "tools": "; for JSON that keeps to a schema there is 'response_format'",
    "tool_choice": "; for JSON that keeps to a schema there is 'response_format'",
    "request_id": "; the header X-Request-Id carries it",
    "chat_template": "; the checkpoint's own is used",
}

# Words of other APIs for what is asked with a field of another name here.
_WORDS_ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "input": ("messages", "prompt"),
    "prompt": ("messages",),
    "messages": ("prompt",),
    "format": ("response_format",),
    "num_predict": ("max_tokens",),
    "max_output_tokens": ("max_tokens",),
}

Body = TypeVar("Body", bound=BaseModel)


class Fields(BaseModel):
    """Strict: JSON types are not converted into each other, and NaN and infinity are no numbers."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """Null asks for nothing, in fields that are not known here too."""
        return {k: v for k, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(Fields):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Fields):
    """What chat and plain completions share. Null means "not given"."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Count | None = None
    min_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Count | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    def sampling(self, max_tokens: int | None, logprobs: int | None, constraint: Constraint | None) -> SamplingParams:
        """Raises `InvalidRequest` naming the field that is out of range."""
        neutral = SamplingParams()
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            skip_special_tokens=neutral.skip_special_tokens
            if self.skip_special_tokens is None
            else self.skip_special_tokens,
            logit_bias=_bias(self.logit_bias or {}),
            logprobs=logprobs,
            n=1 if self.n is None else self.n,
            constraint=constraint,
        )

    def options(self) -> Options:
        """Raises `InvalidRequest` for stream options without a stream."""
        wanted = self.stream_options or StreamOptions()
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true", param="stream_options")
        continuous = bool(wanted.continuous_usage_stats)
        return Options(
            include_usage=bool(wanted.include_usage) or continuous,
            continuous_usage=continuous,
            token_ids=bool(self.return_token_ids),
            tokens_as_ids=bool(self.return_tokens_as_token_ids),
        )


def _bias(entries: Mapping[str, float]) -> dict[int, float]:
    """OpenAI writes the token ids as strings."""
    bias: dict[int, float] = {}
    for key, value in entries.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= _HUGE):
            raise InvalidRequest("the keys of 'logit_bias' must be token ids", param="logit_bias")
        bias[int(key)] = value
    return bias


def read_object(body: Mapping[str, Any] | bytes) -> dict[str, Any]:
    """The JSON object of a request body. Raises `InvalidRequest`."""
    if isinstance(body, bytes):
        text = body.removeprefix(codecs.BOM_UTF8)  # some editors and shells write it before every text
        body = read_json(text, "the body")
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body must be a JSON object")
    return dict(body)


def read_json(text: bytes, what: str) -> Any:
    """The value that `text` says. Raises `InvalidRequest`, which names it `what`."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = error if _is_utf_8(text) else "it is not in UTF-8"
        raise InvalidRequest(f"{what} is not valid JSON: {reason}") from error


def _is_utf_8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_fields(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """`body` as a `kind`. Raises `InvalidRequest` naming the first field that is unknown, unsupported or mistyped."""
    known = kind.model_fields
    unasked = ("tools",) if body.get("tool_choice") == "none" else ()
    for name, value in body.items():
        if name in known or name in IGNORED or name in unasked or value is None:
            continue
        if name not in NEUTRAL:
            raise InvalidRequest(f"unknown field '{str(name)[:80]}'{_meant(str(name), known)}", param=str(name)[:80])
        if not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise InvalidRequest(f"'{name}' is not supported by this version{_INSTEAD.get(name, '')}", param=name)
    try:
        return kind.model_validate({name: value for name, value in body.items() if name in known})
    except ValidationError as error:
        raise _as_invalid_request(error) from error
    except (OverflowError, RecursionError) as error:
        raise InvalidRequest("the body holds a number or a nesting beyond all bounds") from error


def _same(value: Any, neutral: Any) -> bool:
    """Numbers are the same however they are written (1 and 1.0), but none is a truth value."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _meant(name: str, known: Collection[str]) -> str:
    """Which of the known fields somebody means who writes `name`."""
    here = next((word for word in _WORDS_ELSEWHERE.get(name, ()) if word in known), None)
    return f"; did you mean '{here}'?" if here else suggest(name, [*known, *NEUTRAL])


def _as_invalid_request(error: ValidationError) -> InvalidRequest:
    """The first complaint, with the field's place but without the value that was sent."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = [part for part in first["loc"] if not (isinstance(part, str) and _is_type_name(part))]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")[:80]
    if first["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field '{param}'", param=param)
    return InvalidRequest(f"'{param}': {first['msg'][:1].lower()}{first['msg'][1:]}", param=param)


def _is_type_name(part: str) -> bool:
    """pydantic puts the tried branch of a union into the place of an error ("list[str]")."""
    return part in ("str", "int") or part.startswith(("list[", "dict[", "constrained-"))
