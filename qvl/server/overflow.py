"""Conversations that are too long for the model, made to fit: `--overflow window|summary`.

What fits is sent as it is. Of what does not, whole turns leave, the oldest first; with "summary" the model itself
writes down what they said. Counting happens in the backend's threads, and every picture is read once. Knows how a
request, the backend and the rules of `qvl.memory` come together, and what an answer says about it. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

from qvl.backends.base import Backend, collect
from qvl.errors import PromptTooLong, TooManyMedia, Unavailable
from qvl.media.load import Once
from qvl.memory.fit import Fitted, fit
from qvl.memory.growing import Growing, names_of
from qvl.memory.shared import SharedSummaries
from qvl.memory.steps import AsyncAskCall, Messages, adrive
from qvl.memory.summary import Running
from qvl.memory.window import LEAST_SUMMARY, Budget, count_media, take_apart
from qvl.types import ChatRequest, Completion, MediaPart, Message, SamplingParams, Usage
from qvl.wire import Overflowed

Strategy: TypeAlias = Literal["error", "window", "summary"]


class Meter(Protocol):
    """Who counts what happens here (the server's metrics do)."""

    def overflowed(self, strategy: str, dropped: int, summarised: int) -> None:
        """A request was made to fit; so many of its messages left, so many stand in a summary."""

    def summary_call(self, seconds: float, usage: Usage | None) -> None:
        """The model was asked for a summary; without `usage` that failed."""


@dataclass(frozen=True, slots=True)
class Fitting:
    """The request to send; `told` is what its answer says about it, None where nothing happened."""

    request: ChatRequest
    told: Overflowed | None = None


class Overflow:
    """`summary_seconds` bounds all summary calls of one request together; above it the window has to do. `shared` are
    the summaries that this process has in common with others."""

    def __init__(
        self, backend: Backend, meter: Meter, summary_seconds: float, shared: SharedSummaries | None = None
    ) -> None:
        self._backend = backend
        self._meter = meter
        self._seconds = summary_seconds
        self._growing = Growing()
        self._shared = shared

    async def fit(self, request: ChatRequest, strategy: Strategy, request_id: str) -> Fitting:
        """Raises what is wrong with the newest turn (`PromptTooLong`, `BadMedia`, ...) or the backend."""
        budget = _budget(request.sampling, self._backend.info.max_model_len)
        if strategy == "error" or budget is None:
            return Fitting(request)
        once = replace(request, messages=tuple(map(_read_once, request.messages)))
        names = await asyncio.to_thread(names_of, request)
        newest = take_apart(once.messages).newest
        before = names.beginnings[: newest[0] + 1] if newest else ()
        measured = self._growing.measured(before)
        if not self._growing.is_long(before, budget.room) and await self._fits(once, budget):
            return Fitting(once)
        running = await self._running(before, strategy)
        machine = fit(once.messages, budget, strategy=strategy, running=running, measured=measured, keys=names.messages)
        try:
            fitted = await adrive(machine, lambda ms: self._count(once, ms), self._summariser(once, request_id))
        except PromptTooLong as error:
            error.message += " (this is the newest turn with the system messages alone; nothing else can be left out)"
            error.args = (error.message,)
            raise
        self._growing.remember(names.beginnings, fitted.running, measured.cut, budget.room)
        if self._shared is not None and fitted.running is not None and fitted.running != running:
            made = fitted.running
            await asyncio.to_thread(self._shared.keep, names.beginnings[made.covers], made.text, made.tokens)
        told = _told(strategy, once.messages, fitted)
        if told is not None:
            self._meter.overflowed(strategy, told.dropped_messages, told.summarised_messages)
        return Fitting(replace(once, messages=fitted.messages), told)

    async def _running(self, beginnings: Sequence[bytes], strategy: Strategy) -> Running | None:
        """The summary of the most turns, made here or in another process."""
        own = self._growing.running(beginnings)
        if self._shared is None or strategy != "summary":
            return own
        found = await asyncio.to_thread(self._shared.find, beginnings)
        return max((one for one in (own, found) if one is not None), key=lambda one: one.covers, default=None)

    async def _fits(self, request: ChatRequest, budget: Budget) -> bool:
        """Whether the conversation fits as it is."""
        try:
            return await self._count(request, request.messages) <= budget.room
        except (PromptTooLong, TooManyMedia):
            return False

    async def _count(self, request: ChatRequest, messages: Messages) -> int:
        """Exact, and of nothing but the prompt: what else is wrong with the request is said when it is sent."""
        return len(await self._backend.tokenize(replace(request, messages=messages, sampling=SamplingParams())))

    def _summariser(self, request: ChatRequest, request_id: str) -> AsyncAskCall:
        """Asks the model for summaries within the time that is left; pictures that went into one are given back."""
        end = time.monotonic() + self._seconds
        number = 0

        async def ask(messages: Messages, sampling: SamplingParams) -> Completion:
            nonlocal number
            number += 1
            summary = ChatRequest(messages, sampling, limits=request.limits, cache_salt=request.cache_salt)
            started = time.monotonic()
            usage: Usage | None = None
            try:
                deltas = self._backend.chat(summary, f"{request_id}-summary-{number}")
                completion = await asyncio.wait_for(collect(deltas), end - started)
                usage = completion.usage
                return completion
            except asyncio.TimeoutError as error:
                raise Unavailable(f"it took longer than {self._seconds:g} s") from error
            finally:
                self._meter.summary_call(time.monotonic() - started, usage)
                _forget(messages)

        return ask


def _budget(sampling: SamplingParams, tokens: int) -> Budget | None:
    """What a prompt may take: room for the answer that is asked for stays free, at most half of the context.

    None for a context too small to divide (or not known before the model is loaded): then nothing is made to fit.
    """
    most = min(tokens // 2, tokens - 2 * LEAST_SUMMARY)
    if most < 1:
        return None
    wish = sampling.max_tokens
    usual = Budget.of(tokens, answer=None if wish is None else max(1, min(wish, most)))
    answer = min(max(usual.answer, sampling.min_tokens), most)
    return replace(Budget.of(tokens, answer=answer), least=max(1, sampling.min_tokens))


def _read_once(message: Message) -> Message:
    parts = message.parts
    if not any(isinstance(part, MediaPart) for part in parts):
        return message
    return replace(
        message,
        parts=tuple(replace(part, source=Once(part.source)) if isinstance(part, MediaPart) else part for part in parts),
    )


def _forget(messages: Sequence[Message]) -> None:
    for message in messages:
        for part in message.parts:
            if isinstance(part, MediaPart) and isinstance(part.source, Once):
                part.source.forget()


def _told(strategy: Literal["window", "summary"], messages: Messages, fitted: Fitted) -> Overflowed | None:
    """What left, what stands in the summary, and why there is none; None where all of it is in the request."""
    gone, failed = (
        next((notice for notice in fitted.notices if notice.kind == kind), None)
        for kind in ("dropped", "summary_failed")
    )
    running = fitted.running
    if running is not None and gone is not None and gone.first < running.covers:
        running = None  # there was no room for it
    dropped = _turns(messages, gone.first, gone.end) if gone else []
    summarised = _turns(messages, 0, running.covers) if running else []
    if not dropped and not summarised:
        return None
    return Overflowed(
        overflow=strategy,
        dropped_messages=len(dropped),
        dropped_media=count_media(dropped),
        summarised_messages=len(summarised),
        summarised_media=count_media(summarised),
        summary=running.text if running else None,
        summary_error=failed.reason if failed else None,
    )


def _turns(messages: Messages, first: int, end: int) -> list[Message]:
    """System messages never leave."""
    return [message for message in messages[first:end] if message.role != "system"]
