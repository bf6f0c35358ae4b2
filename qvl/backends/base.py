"""What answers requests: the one seam between programs (server, command line, batch) and whatever computes.

Knows the questions a backend is asked and the shapes of its answers. Does not know HTTP, tokens of a model or torch.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from qvl.engine.answers import Collector
from qvl.types import ChatRequest, Completion, CompletionRequest, Delta, PictureRule


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What a backend serves; complete once `start` has returned.

    `names` are the model's names, the first one is put into answers. `max_model_len` and `kv_tokens` are tokens,
    `max_num_seqs` answers that are computed at once, `load_seconds` the time from the start to ready. `picture` is how
    the model sees a picture about whose size its request says nothing; None where that is not told.
    """

    names: tuple[str, ...]
    max_model_len: int
    max_num_seqs: int
    device: str
    dtype: str
    attention: str = ""
    kv_tokens: int = 0
    load_seconds: float = 0.0
    picture: PictureRule | None = None


class Observer(Protocol):
    """Who wants to know how long the stages of a request and of its pictures took (the server's metrics do)."""

    def request_stage(self, stage: str, seconds: float) -> None:
        """One request spent `seconds` in "prepare" (template, pictures, tokens) or waited so for its "first_token"."""

    def media_stage(self, kind: str, stage: str, seconds: float) -> None:
        """One picture or video (`kind`) spent `seconds` in `stage`: "fetch", "decode", "resize", "hash" or "share"."""


class Backend(Protocol):
    """Answers requests. Everything runs on one asyncio loop; nothing here may block it.

    `chat` and `complete` are asynchronous generators: every answer's last `Delta` carries its finish_reason, the
    generator ends when all `n` answers have ended, and closing it early aborts what still runs. Before the first delta
    they raise what is wrong with the request (`InvalidRequest` ...) or with the backend (`Unavailable`).
    """

    observer: Observer | None

    @property
    def info(self) -> BackendInfo:
        """What is served; before `start` has returned some numbers may still be 0."""

    @property
    def not_ready(self) -> str | None:
        """None when a request would be answered, else the reason why not, fit to be shown to callers."""

    def launch(self) -> None:
        """Begin what takes long and needs no loop, for who has something else to do before `start`."""

    async def start(self) -> None:
        """Returns when requests can be answered. Raises `ConfigError` when that will never be so."""

    async def stop(self) -> None:
        """Ends at once what still runs and gives back all resources. Safe to call twice, and without `start`."""

    def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """The answers to a conversation."""

    def complete(self, request: CompletionRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        """The continuations of a text."""

    async def tokenize(self, request: ChatRequest | CompletionRequest) -> Sequence[int]:
        """The token ids that the request's prompt would have, pictures included."""

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included. Raises `InvalidRequest` for ids outside the vocabulary."""

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token (for logprobs)."""

    def stats(self) -> Mapping[str, float]:
        """Numbers for monitoring by name; a name that ends in `_total` only grows."""


async def collect(deltas: AsyncGenerator[Delta, None]) -> Completion:
    """All answers of a stream, in the order of their index; the stream is closed in any case."""
    collector = Collector()
    async with aclosing(deltas):
        async for delta in deltas:
            collector.add(delta)
    return collector.completion()
