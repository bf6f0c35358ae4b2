"""Answers in OpenAI's shapes, as JSON bytes: whole ones, chunks of a stream, lists of models.

Knows the shapes. Does not know sockets or event streams. Chunks are on the hot path (one per token and answer): plain
dictionaries through msgspec, no models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from qvl.errors import QvlError
from qvl.types import Answer, Completion, Delta, PictureRule, TokenLogprob, Usage

TokenBytes: TypeAlias = Callable[[int], bytes]

_encode = msgspec.json.Encoder().encode
_MARK = "\ue000the text of a chunk\ue000"
_LOWEST = -9999.0  # what OpenAI writes where a probability is zero: JSON has no infinity


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of one answer share: the request's id, the served model's name, Unix seconds."""

    id: str
    model: str
    created: int


@dataclass(frozen=True, slots=True)
class Options:
    """What a request may say about the form of its answer.

    `include_usage`: a last chunk with the token counts. `continuous_usage`: counts in every chunk. `token_ids`: the ids
    beside the text. `tokens_as_ids`: log-probabilities name tokens "token_id:7".
    """

    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False


@dataclass(frozen=True, slots=True)
class Overflowed:
    """How a conversation that was too long was made to fit; stands as "qvl" in the answer, which clients of OpenAI's
    shapes pass over.

    `dropped_*` are in the prompt in no form; `summary` stands there for `summarised_*`. `summary_error`: why there is
    no (newer) summary.
    """

    overflow: str
    dropped_messages: int = 0
    dropped_media: int = 0
    summarised_messages: int = 0
    summarised_media: int = 0
    summary: str | None = None
    summary_error: str | None = None


class _Frames:
    """Chunks that say nothing but text differ in nothing but their text: what stands around it, by answer."""

    def __init__(self) -> None:
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def write(self, delta: Delta) -> bytes | None:
        """The chunk, None where none of its kind has been written yet."""
        around = self._around.get(delta.index)
        return None if around is None else b"%b%b%b" % (around[0], _encode(delta.text), around[1])

    def learn(self, delta: Delta, chunk: Callable[[Delta], Mapping[str, Any]]) -> bytes:
        """The same from `chunk`, which writes it in full, once."""
        marked = _encode(chunk(Delta(delta.index, _MARK, usage=delta.usage)))
        before, _, after = marked.rpartition(_encode(_MARK))
        self._around[delta.index] = before, after
        return b"%b%b%b" % (before, _encode(delta.text), after)


def _is_plain(delta: Delta, options: Options) -> bool:
    """Whether its chunk says nothing but text."""
    says_more = delta.finish_reason is not None or delta.logprobs is not None
    return not (says_more or options.token_ids or options.continuous_usage)


class ChatWriter:
    """Writes the answer to one chat request; keep one per request (it remembers which answers have begun).

    `overflowed` is told in the whole answer, and in the first chunk of a stream.
    """

    def __init__(
        self,
        head: Head,
        token_bytes: TokenBytes,
        options: Options = Options(),
        overflowed: Overflowed | None = None,
    ) -> None:
        self._head = head
        self._told = {} if overflowed is None else {"qvl": overflowed}
        self._token_bytes = token_bytes
        self._options = options
        self._begun: set[int] = set()
        self._frames = _Frames()

    def chunk(self, delta: Delta) -> bytes:
        """One `chat.completion.chunk`; the first of every answer carries its role."""
        if delta.index not in self._begun:
            told = {} if self._begun else self._told
            self._begun.add(delta.index)
            return _encode({**self._chunk(delta, {"role": "assistant", "content": delta.text}), **told})
        if _is_plain(delta, self._options):
            return self._frames.write(delta) or self._frames.learn(delta, self._chunk)
        return _encode(self._chunk(delta))

    def _chunk(self, delta: Delta, message: dict[str, str] | None = None) -> Mapping[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": message or {"content": delta.text},
            "logprobs": self._logprobs(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._options.token_ids:
            choice["token_ids"] = delta.token_ids
        return _chunk(self._head, "chat.completion.chunk", [choice], self._options, delta.usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk of a stream with `include_usage`: no choices, the exact counts."""
        return _encode(_usage_chunk(self._head, "chat.completion.chunk", usage))

    def response(self, completion: Completion) -> bytes:
        """A whole `chat.completion`."""
        choices = [self._choice(answer) for answer in completion.answers]
        return _encode({**_whole(self._head, "chat.completion", choices, completion.usage), **self._told})

    def _choice(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": answer.index,
            "message": {"role": "assistant", "content": answer.text},
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        return {**choice, "token_ids": answer.token_ids} if self._options.token_ids else choice

    def _logprobs(self, entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if entries is None:
            return None
        content = [
            {**self._token(e.token_id, e.logprob), "top_logprobs": [self._token(id, value) for id, value in e.top]}
            for e in entries
        ]
        return {"content": content}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes(token_id)
        name = _token_name(token_id, data, self._options)
        return {"token": name, "logprob": _finite(logprob), "bytes": list(data)}


class CompletionWriter:
    """Writes the answers to one `/v1/completions` request; keep one per request (it remembers lengths).

    With several prompts, the answers of prompt i have the indices i * n and on.
    """

    def __init__(self, head: Head, token_bytes: TokenBytes, options: Options = Options()) -> None:
        self._head = head
        self._token_bytes = token_bytes
        self._options = options
        self._lengths: dict[int, int] = {}
        self._frames = _Frames()

    def chunk(self, delta: Delta) -> bytes:
        """One `text_completion` piece."""
        if _is_plain(delta, self._options):
            return self._frames.write(delta) or self._frames.learn(delta, self._chunk)
        return _encode(self._chunk(delta))

    def _chunk(self, delta: Delta) -> Mapping[str, Any]:
        index = delta.index
        choice = self._choice(
            index, delta.text, delta.token_ids, delta.logprobs, delta.finish_reason, delta.stop_reason
        )
        return _chunk(self._head, "text_completion", [choice], self._options, delta.usage)

    def usage_chunk(self, usage: Usage) -> bytes:
        """The last chunk of a stream with `include_usage`: no choices, the exact counts."""
        return _encode(_usage_chunk(self._head, "text_completion", usage))

    def response(self, completions: Sequence[Completion]) -> bytes:
        """A whole `text_completion` for all prompts of the request."""
        choices: list[dict[str, Any]] = []
        for completion in completions:
            for a in completion.answers:
                choices.append(
                    self._choice(len(choices), a.text, a.token_ids, a.logprobs, a.finish_reason, a.stop_reason)
                )
        return _encode(_whole(self._head, "text_completion", choices, add_usage([c.usage for c in completions])))

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if logprobs is None else self._logprobs(index, logprobs),
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        }
        return {**choice, "token_ids": token_ids} if self._options.token_ids else choice

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Parallel lists, as this older endpoint has them; `text_offset` counts characters from the answer's start."""
        names, offsets, tops = [], [], []
        offset = self._lengths.get(index, 0)
        for entry in entries:
            name = self._name(entry.token_id)
            names.append(name)
            offsets.append(offset)
            offset += len(self._token_bytes(entry.token_id).decode("utf-8", "replace"))
            tops.append({self._name(id): _finite(value) for id, value in entry.top})
        self._lengths[index] = offset
        values = [_finite(entry.logprob) for entry in entries]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, token_id: int) -> str:
        return _token_name(token_id, self._token_bytes(token_id), self._options)


def add_usage(parts: Sequence[Usage]) -> Usage:
    """The counts of several requests together."""
    return Usage(
        sum(part.prompt_tokens for part in parts),
        sum(part.completion_tokens for part in parts),
        sum(part.cached_tokens for part in parts),
    )


def model_list(
    names: Sequence[str], *, created: int, max_model_len: int, picture: PictureRule | None = None
) -> dict[str, Any]:
    """The body of `/v1/models`; `max_model_len` in tokens. `picture` lets clients send no more than the model sees."""
    sees = {} if picture is None else {"picture": dataclasses.asdict(picture)}
    same = {
        "object": "model",
        "created": created,
        "owned_by": "qvl",
        "root": names[0] if names else None,
        "parent": None,
    }
    return {"object": "list", "data": [{"id": name, **same, "max_model_len": max_model_len, **sees} for name in names]}


def tokenize_response(
    token_ids: Sequence[int], *, max_model_len: int, token_bytes: TokenBytes | None = None
) -> dict[str, Any]:
    """The body of `/tokenize`; with `token_bytes` also each token's text."""
    texts = None if token_bytes is None else [token_bytes(id).decode("utf-8", "replace") for id in token_ids]
    return {"count": len(token_ids), "max_model_len": max_model_len, "tokens": list(token_ids), "token_strs": texts}


def detokenize_response(text: str) -> dict[str, Any]:
    """The body of `/detokenize`."""
    return {"prompt": text}


def error_body(error: QvlError) -> dict[str, Any]:
    """The OpenAI error body."""
    return {"error": dict(error.body()["error"])}


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LOWEST else _LOWEST  # also for not-a-number, which compares false


def _token_name(token_id: int, data: bytes, options: Options) -> str:
    return f"token_id:{token_id}" if options.tokens_as_ids else data.decode("utf-8", "replace")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _chunk(head: Head, kind: str, choices: list[dict[str, Any]], options: Options, usage: Usage) -> Mapping[str, Any]:
    chunk = {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}
    if options.continuous_usage:
        chunk["usage"] = _usage(usage)
    elif options.include_usage:
        chunk["usage"] = None
    return chunk


def _usage_chunk(head: Head, kind: str, usage: Usage) -> Mapping[str, Any]:
    return {**_chunk(head, kind, [], Options(), usage), "usage": _usage(usage)}


def _whole(head: Head, kind: str, choices: list[dict[str, Any]], usage: Usage) -> Mapping[str, Any]:
    return {**_chunk(head, kind, choices, Options(), usage), "usage": _usage(usage)}
