"""A conversation that keeps under a token budget by itself, and stays in a store whole.

The user's turn is written before the model is asked, the answer when it is complete: what kills the process in between
leaves no half turn. `Conversation` blocks, `AsyncConversation` awaits; both drive the same machine. Knows the order of
things. Does not know how tokens are counted, who answers, or what fits: that is handed in, or decided in `fit`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeAlias, TypeVar

from qvl.client import collect, question
from qvl.errors import BadMedia, ConfigError, InvalidRequest, MediaRefused, PayloadTooLarge, PromptTooLong, TooManyMedia
from qvl.memory.costs import Measured
from qvl.memory.counting import AsyncTokenCounter, TokenCounter
from qvl.memory.fit import Fitted, Notice, fit
from qvl.memory.records import Turn
from qvl.memory.steps import Ask, AskCall, AsyncAskCall, Machine, Messages, adrive, changed, drive
from qvl.memory.store import Store, new_id
from qvl.memory.summary import Running
from qvl.memory.window import STRATEGIES, Budget, Strategy
from qvl.types import Answer, Completion, Delta, Message, SamplingParams, TextPart, Usage

StreamCall: TypeAlias = Callable[[Messages, SamplingParams], Iterator[Delta]]
AsyncStreamCall: TypeAlias = Callable[[Messages, SamplingParams], AsyncIterator[Delta]]
AskT = TypeVar("AskT")
CountT = TypeVar("CountT")
StreamT = TypeVar("StreamT")

# What makes a new turn itself impossible: it is taken back, or it would stand in the way of every later one.
_REFUSALS = (PromptTooLong, TooManyMedia, BadMedia, MediaRefused, PayloadTooLarge)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: its text, the whole completion, and how the request was made to fit.

    `notices` say which turns were summarised or left out (by their numbers in the store), `prompt_tokens` is the exact
    prompt, `turn` the answer as it was stored.
    """

    text: str
    completion: Completion
    notices: tuple[Notice, ...]
    prompt_tokens: int
    turn: Turn


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A request as it is sent; `notices` by the numbers of turns in the store."""

    messages: Messages
    num_tokens: int
    notices: tuple[Notice, ...]
    sampling: SamplingParams


class _Talk(Generic[AskT, CountT, StreamT]):
    """What both faces share: a turn as a machine, everything but the calls."""

    def __init__(
        self,
        store: Store,
        ask: AskT,
        count: CountT,
        budget: int | Budget,
        strategy: Strategy = "summary",
        *,
        stream: StreamT | None = None,
        id: str | None = None,
        system: str | None = None,
        name: str = "",
        model: str | None = None,
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"unknown strategy '{strategy}'; there are {', '.join(STRATEGIES)}")
        self.store = store
        self.id = new_id() if id is None else store.find(id)
        self.budget = Budget.of(budget) if isinstance(budget, int) else budget
        self.strategy: Strategy = strategy
        self.last: Reply | None = None
        self._ask = ask
        self._count = count
        self._stream = stream
        self._system = system
        self._name = name
        self._model = model
        self._measured = Measured()
        self._known: list[Turn] = []

    @property
    def turns(self) -> list[Turn]:
        """Everything that was said, whatever the model still sees of it."""
        ids = self.store.turn_ids(self.id)
        known = [turn.id for turn in self._known]
        if ids[: len(known)] != known:  # something was undone, here or by another process
            self._known, known = [], []
        if len(ids) > len(known):
            self._known = self._known + self.store.turns(self.id, self._known[-1].number + 1 if known else 0)
        return list(self._known)

    @property
    def unanswered(self) -> bool:
        """Whether the last turn is the user's: an answer failed, or the process ended before it came."""
        turns = self.turns
        return bool(turns) and turns[-1].message.role == "user"

    def undo(self) -> int:
        """Remove the last user turn and what followed it, for good. Returns how many turns went."""
        users = [turn.number for turn in self.turns if turn.message.role == "user"]
        return self.store.cut(self.id, users[-1]) if users else 0

    def rename(self, name: str) -> None:
        """Call the conversation `name`; before its first turn the name is kept for then."""
        self._name = name
        if self.turns:
            self.store.rename(self.id, name)

    def _write(self, message: Message) -> Turn:
        """The user's turn into the store, after the system message where it is the first."""
        if self._system is not None and not self.turns:
            self.store.append(self.id, Message("system", (TextPart(self._system),)), name=self._name)
        return self.store.append(self.id, message, name=self._name)

    def _turn(self, message: Message | None, sampling: SamplingParams | None) -> Machine[Reply]:
        """A question and its whole answer, written when they are there."""
        prepared = yield from self._prepare(message, sampling)
        completion = yield Ask(prepared.messages, prepared.sampling)
        return self._record(prepared, completion)

    def _prepare(self, message: Message | None, sampling: SamplingParams | None) -> Machine[_Prepared]:
        """The request for the newest user turn: `message`, written first, or with None the one that is there."""
        rules = sampling or SamplingParams()
        if rules.n != 1:
            raise InvalidRequest("a turn of a conversation has one answer: 'n' must be 1", param="n")
        if message is None and not self.unanswered:
            raise InvalidRequest(
                "the last turn of this conversation has its answer" if self.turns else "nothing has been asked yet"
            )
        written = None if message is None else self._write(message)
        turns = self.turns
        running = self._running(turns)
        try:
            fitting = fit(
                [turn.message for turn in turns],
                self.budget,
                strategy=self.strategy,
                running=running,
                measured=self._measured,
                keys=[turn.id for turn in turns],
            )
            fitted = yield from changed(fitting, self._resolved)
        except _REFUSALS:
            if written is not None:
                self.store.take_back(written)
            raise
        if fitted.running is not None and fitted.running is not running:
            last = turns[fitted.running.covers - 1]
            self.store.add_summary(self.id, last.number + 1, fitted.running.text, fitted.running.tokens)
        notices = _numbered(fitted.notices, turns)
        return _Prepared(self._resolved(fitted.messages), fitted.num_tokens, notices, self._rules(rules, fitted))

    def _running(self, turns: list[Turn]) -> Running | None:
        """The summary in force, its reach as an index into `turns`."""
        summaries = self.store.summaries(self.id)
        if not summaries:
            return None
        newest = summaries[-1]
        return Running(newest.text, sum(turn.number < newest.covers for turn in turns), newest.tokens)

    def _rules(self, rules: SamplingParams, fitted: Fitted) -> SamplingParams:
        room = self.budget.tokens - fitted.num_tokens
        return replace(rules, max_tokens=room if rules.max_tokens is None else min(rules.max_tokens, room))

    def _streaming(self) -> StreamT:
        if self._stream is None:
            raise ConfigError("this conversation was made without 'stream'")
        return self._stream

    def _record(self, prepared: _Prepared, completion: Completion) -> Reply:
        """The answer into the store, whole."""
        answer = completion.answers[0]
        turn = self.store.append(
            self.id,
            Message("assistant", (TextPart(answer.text),)),
            model=self._model,
            finish_reason=answer.finish_reason,
            usage=completion.usage,
        )
        self.last = Reply(answer.text, completion, prepared.notices, prepared.num_tokens, turn)
        return self.last

    def _record_stopped(self, prepared: _Prepared, deltas: list[Delta]) -> None:
        """What came before the listener left is an answer too, marked as broken off; nothing is no answer."""
        text = "".join(delta.text for delta in deltas)
        if text:
            usage = max((delta.usage for delta in deltas), key=lambda one: one.completion_tokens, default=Usage())
            self._record(prepared, Completion((Answer(0, text, (), "abort"),), usage))

    def _resolved(self, messages: Messages) -> Messages:
        """With the pictures themselves instead of their names in the store."""
        return tuple(map(self.store.resolve, messages))


class Conversation(_Talk[AskCall, TokenCounter, StreamCall]):
    """One conversation of `store` with whoever `ask` reaches; every call blocks. One turn at a time.

    `ask(messages, sampling)` answers (`Client.chat`, `LLM.chat`), `count` is a `TokenCounter` of the same model,
    `budget` the tokens of one request with its answer (or a `Budget`). `stream` (`Client.stream`, `LLM.stream`) is only
    needed for answers piece by piece. `id` goes on with a conversation (anything `Store.find` knows); without it a new
    one is made when its first turn is written, with `system` and `name`. `model` is noted beside every answer.
    """

    def send(self, turn: str | Message, *media: Any, sampling: SamplingParams | None = None) -> Reply:
        """Say something, with pictures or videos (anything `Client.ask` takes), and wait for the answer.

        Raises `PromptTooLong` and the like for a turn that cannot be sent, which is then not kept. Any other error
        leaves the turn in the store without an answer: `retry` asks again, `undo` removes it.
        """
        return drive(self._turn(_user_turn(turn, media), sampling), self._count, self._ask)

    def retry(self, sampling: SamplingParams | None = None) -> Reply:
        """Ask again for the answer that is missing. Raises `InvalidRequest` when none is."""
        return drive(self._turn(None, sampling), self._count, self._ask)

    def stream(
        self, turn: str | Message | None, *media: Any, sampling: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """`send` piece by piece (`retry` with None); `last` is the `Reply` when it is through.

        Leaving the loop early stops the answer and keeps what was said so far.
        """
        call, message = self._streaming(), None if turn is None else _user_turn(turn, media)
        prepared = drive(self._prepare(message, sampling), self._count, self._ask)
        deltas: list[Delta] = []
        try:
            with closing(_closable(call(prepared.messages, prepared.sampling))) as pieces:
                for delta in pieces:
                    deltas.append(delta)
                    yield delta
        except (GeneratorExit, KeyboardInterrupt):
            self._record_stopped(prepared, deltas)
            raise
        self._record(prepared, collect(deltas))


class AsyncConversation(_Talk[AsyncAskCall, AsyncTokenCounter, AsyncStreamCall]):
    """`Conversation`, awaited: `ask`, `count` and `stream` are those of an asynchronous client."""

    async def send(self, turn: str | Message, *media: Any, sampling: SamplingParams | None = None) -> Reply:
        """As `Conversation.send`."""
        return await adrive(self._turn(_user_turn(turn, media), sampling), self._count, self._ask)

    async def retry(self, sampling: SamplingParams | None = None) -> Reply:
        """As `Conversation.retry`."""
        return await adrive(self._turn(None, sampling), self._count, self._ask)

    async def stream(
        self, turn: str | Message | None, *media: Any, sampling: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """As `Conversation.stream`."""
        call, message = self._streaming(), None if turn is None else _user_turn(turn, media)
        prepared = await adrive(self._prepare(message, sampling), self._count, self._ask)
        deltas: list[Delta] = []
        try:
            async with aclosing(_aclosable(call(prepared.messages, prepared.sampling))) as pieces:
                async for delta in pieces:
                    deltas.append(delta)
                    yield delta
        except (GeneratorExit, asyncio.CancelledError):
            self._record_stopped(prepared, deltas)
            raise
        await asyncio.to_thread(self._record, prepared, collect(deltas))


def _user_turn(turn: str | Message, media: tuple[Any, ...]) -> Message:
    if isinstance(turn, str):
        return question(turn, media)[-1]
    if media or turn.role == "system":
        raise InvalidRequest("a message is sent as it is: a user's, with its pictures among its parts")
    return turn


def _numbered(notices: tuple[Notice, ...], turns: list[Turn]) -> tuple[Notice, ...]:
    """The notices by the numbers that turns have in the store."""
    return tuple(
        replace(notice, first=turns[notice.first].number, end=turns[notice.end - 1].number + 1) for notice in notices
    )


def _closable(deltas: Iterator[Delta]) -> Any:
    """An iterator that can be closed; one that cannot has nothing to stop."""
    return deltas if hasattr(deltas, "close") else (delta for delta in deltas)


def _aclosable(deltas: AsyncIterator[Delta]) -> Any:
    return deltas if hasattr(deltas, "aclose") else (delta async for delta in deltas)
