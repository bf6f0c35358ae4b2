"""The other side of the wire: requests of `qvl.types` as bodies for a server, and a server's answers back in our words.

Knows qvl's, vLLM's and OpenAI's answers. Does not know sockets; pictures must already be URLs. Token ids are there only
when the request asked for them (`return_token_ids`, `return_tokens_as_token_ids`); unknown ones read as -1.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from qvl.errors import InvalidRequest, Overloaded, PromptTooLong, QvlError, RequestFailed
from qvl.types import (
    Answer,
    ChatRequest,
    Completion,
    CompletionRequest,
    Delta,
    FinishReason,
    Message,
    Part,
    PixelLimits,
    SamplingParams,
    TextPart,
    TokenLogprob,
    Usage,
)
from qvl.wire.structured import constraint_body

UNKNOWN_ID = -1

_FINISH_REASONS: Mapping[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort", "error": "error"}


def chat_body(request: ChatRequest, model: str, stream: bool) -> dict[str, Any]:
    """The body of a chat completion; only what differs from the defaults is written. `parse_chat` reads it back.

    Raises `InvalidRequest` for pictures that are not addresses (str).
    """
    sampling = _sampling_body(request.sampling)
    if "logprobs" in sampling:
        sampling |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    body = {"model": model, "messages": [_message(message) for message in request.messages], **sampling}
    if stream:
        body["stream"] = True
    if limits := _given(request.limits):
        body["mm_processor_kwargs"] = limits
    if request.continue_final_message:
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    elif not request.add_generation_prompt:
        body["add_generation_prompt"] = False
    if request.add_vision_id:
        body["add_vision_id"] = True
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    return body


def completion_body(request: CompletionRequest, model: str, stream: bool) -> dict[str, Any]:
    """The body of a plain completion; `parse_completion` reads it back."""
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    body: dict[str, Any] = {"model": model, "prompt": prompt, **_sampling_body(request.sampling)}
    if stream:
        body["stream"] = True
    if request.echo:
        body["echo"] = True
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    return body


def _sampling_body(sampling: SamplingParams) -> dict[str, Any]:
    body = _given(sampling, SamplingParams())
    if "logit_bias" in body:
        body["logit_bias"] = {str(id): value for id, value in sampling.logit_bias.items()}
    body.pop("constraint", None)
    body |= constraint_body(sampling.constraint)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in body.items()}


def _given(
    values: SamplingParams | PixelLimits, neutral: SamplingParams | PixelLimits = PixelLimits()
) -> dict[str, Any]:
    """The fields that differ from `neutral`."""
    found = {field.name: getattr(values, field.name) for field in dataclasses.fields(values)}
    return {name: value for name, value in found.items() if value != getattr(neutral, name)}


def _message(message: Message) -> dict[str, Any]:
    parts = message.parts
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return {"role": message.role, "content": parts[0].text}
    return {"role": message.role, "content": [_part(part) for part in parts]}


def _part(part: Part) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    if part.kind == "video" and isinstance(part.source, list | tuple):
        return {"type": "video", "video": [_address(frame) for frame in part.source], **_given(part.limits)}
    kind = f"{part.kind}_url"
    return {"type": kind, kind: {"url": _address(part.source), **_given(part.limits)}}


def _address(source: Any) -> str:
    if not isinstance(source, str):
        raise InvalidRequest(f"a {type(source).__name__} cannot travel in a request: give a URL or a data URL")
    return source


def read_chunk(chunk: Mapping[str, Any]) -> list[Delta]:
    """What one `chat.completion.chunk` brings.

    The last chunk of a stream may hold no choices but the usage: that is one empty delta of answer 0, without a
    finish_reason. Raises `RequestFailed` for what is not understood, and the error that a server put into its stream.
    """
    return list(_deltas(chunk, chat=True))


def read_completion_chunk(chunk: Mapping[str, Any]) -> list[Delta]:
    """What one chunk of a streamed `text_completion` brings; as `read_chunk`."""
    return list(_deltas(chunk, chat=False))


def _deltas(chunk: Mapping[str, Any], chat: bool) -> Iterator[Delta]:
    if "error" in chunk:
        raise read_error(500, chunk)
    try:
        usage = _read_usage(chunk.get("usage"))
        choices = chunk["choices"]
        if not choices and usage != Usage():
            yield Delta(0, "", usage=usage)
        for choice in choices:
            reason = choice.get("finish_reason")
            yield Delta(
                index=choice["index"],
                text=(choice["delta"].get("content") if chat else choice["text"]) or "",
                token_ids=tuple(choice.get("token_ids") or ()),
                logprobs=_read_logprobs(choice.get("logprobs"), chat),
                finish_reason=None if reason is None else _FINISH_REASONS.get(reason, "stop"),
                stop_reason=choice.get("stop_reason"),
                usage=usage,
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RequestFailed("the server sent a chunk that is not understood") from error


def read_response(response: Mapping[str, Any]) -> Completion:
    """A whole `chat.completion` or `text_completion`. Raises `RequestFailed` for what is not understood."""
    if "error" in response:
        raise read_error(500, response)
    try:
        answers = tuple(_read_answer(choice) for choice in response["choices"])
        return Completion(tuple(sorted(answers, key=lambda a: a.index)), _read_usage(response.get("usage")))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RequestFailed("the server sent an answer that is not understood") from error


def _read_answer(choice: Mapping[str, Any]) -> Answer:
    chat = "message" in choice
    return Answer(
        index=choice["index"],
        text=(choice["message"].get("content") if chat else choice["text"]) or "",
        token_ids=tuple(choice.get("token_ids") or ()),
        finish_reason=_FINISH_REASONS.get(choice["finish_reason"], "stop"),
        stop_reason=choice.get("stop_reason"),
        logprobs=_read_logprobs(choice.get("logprobs"), chat),
    )


def _read_usage(usage: Mapping[str, Any] | None) -> Usage:
    if not usage:
        return Usage()
    details = usage.get("prompt_tokens_details") or {}
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, details.get("cached_tokens") or 0)


def _read_logprobs(logprobs: Mapping[str, Any] | None, chat: bool) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None:
        return None
    if chat:
        return tuple(
            TokenLogprob(
                _read_id(entry["token"]),
                entry["logprob"],
                tuple((_read_id(other["token"]), other["logprob"]) for other in entry.get("top_logprobs") or ()),
            )
            for entry in logprobs.get("content") or ()
        )
    tops = logprobs.get("top_logprobs") or [{}] * len(logprobs["tokens"])
    return tuple(
        TokenLogprob(_read_id(token), value, tuple((_read_id(name), top) for name, top in (others or {}).items()))
        for token, value, others in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True)
    )


_TAG = re.compile(r"<[^>]*>")


def _read_id(token: str) -> int:
    id = token.removeprefix("token_id:")
    return int(id) if id != token and id.isdigit() else UNKNOWN_ID


def read_error(status: int, body: Mapping[str, Any] | bytes, retry_after: int = 1) -> QvlError:
    """The error that a server's answer stands for: its class by OpenAI code, else by HTTP status."""
    try:
        told = (msgspec.json.decode(body) if isinstance(body, bytes) else body)["error"]
        message, code, param = str(told["message"]), told.get("code"), told.get("param")
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        text = body[:2000].decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
        shown = " ".join(_TAG.sub(" ", text).split())[:200]  # of a web page its words, on one line
        message, code, param = f"the server answered {status}: {shown}", None, None
    kind = _class_of(status, code)
    error = kind.__new__(kind, message)  # some classes compose their message themselves; here it is already told
    QvlError.__init__(error, message, param=param if isinstance(param, str) else None)
    if isinstance(error, Overloaded):
        error.retry_after = retry_after
    if isinstance(error, PromptTooLong):
        error.num_tokens = error.limit = 0  # the message has the numbers
    return error


def _class_of(status: int, code: object) -> type[QvlError]:
    """The closest class below `QvlError`."""
    classes = list(_subclasses(QvlError))
    by_code = {kind.code: kind for kind in classes if "code" in vars(kind)}
    if isinstance(code, str) and code in by_code:
        return by_code[code]
    by_status = {kind.status: kind for kind in classes if "status" in vars(kind)}
    return by_status.get(status) or (InvalidRequest if 400 <= status < 500 else QvlError)


def _subclasses(kind: type[QvlError]) -> Iterator[type[QvlError]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
