"""One conversation into one request that fits: a state machine that asks for counts and summaries and makes no calls.

So a synchronous client, an asynchronous one, a model in this process and a server drive the same rules (`steps.drive`,
`steps.adrive`). Needs messages and counts; does not know stores, sockets or tokenizers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from qvl.errors import InvalidRequest, PromptTooLong, QvlError, TooManyMedia
from qvl.memory.steps import FAILURES, Ask, Count, Machine, Messages
from qvl.memory.summary import (
    Running,
    SummaryFailed,
    read_summary,
    summary_messages,
    summary_sampling,
    with_summary,
)
from qvl.memory.window import (
    Budget,
    Cost,
    Decision,
    Exchange,
    Shape,
    Strategy,
    count_media,
    decide,
    take_apart,
    too_long,
)
from qvl.types import Completion, Message, TextPart

MOST_FOLDS = 8  # summary calls before one answer; what is left over is folded before the next answers
SHORTEST_CHARS = 64  # a text that is cut shorter than this for its summary says nothing any more

_PROBE = Message("user", (TextPart("."),))


@dataclass(frozen=True, slots=True)
class Notice:
    """What happened to turns [first, end) (indices of messages) on the way into a request, and to their `media`.

    "summarised": folded into the running summary just now. "dropped": not in this request in any form.
    "summary_failed": `reason` says why; the turns stay as they are, and what does not fit is dropped.
    """

    kind: Literal["summarised", "dropped", "summary_failed"]
    first: int
    end: int
    media: int = 0
    reason: str = ""

    def __str__(self) -> str:
        turns = f"turn {self.first}" if self.end - self.first == 1 else f"turns {self.first} to {self.end - 1}"
        pictures = f" with {self.media} picture{'s' if self.media > 1 else ''}" if self.media else ""
        if self.kind == "summarised":
            return f"{turns}{pictures} summarised"
        if self.kind == "dropped":
            return f"{turns}{pictures} left out of the request"
        return f"{turns} could not be summarised ({self.reason}); older turns are left out instead"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request that fits: `num_tokens` is its exact prompt. `running` is the summary to remember (it may be new)."""

    messages: Messages
    num_tokens: int
    notices: tuple[Notice, ...] = ()
    running: Running | None = None


@dataclass(slots=True)
class Measured:
    """What earlier calls of `fit` for the same conversation and model found out. Give it back to save counting.

    `exchanges`: the tokens that an exchange adds to a prompt, by the keys of its messages. `max_media`: the most
    pictures of one request, learnt from a refusal.
    """

    exchanges: dict[tuple[Hashable, ...], int] = field(default_factory=dict)
    probe: int | None = None
    max_media: int | None = None


def fit(
    messages: Sequence[Message],
    budget: Budget,
    *,
    strategy: Strategy = "summary",
    running: Running | None = None,
    measured: Measured | None = None,
    keys: Sequence[Hashable] | None = None,
) -> Machine[Fitted]:
    """Messages in, a request out whose prompt has at most `budget.room` tokens, counted exactly.

    Only a newest turn that is longer by itself goes alone, up to `budget.limit`.

    `running` is the summary that an earlier call returned. `keys[i]` names `messages[i]` in `measured` (its index when
    not given) and must not be used again for another message. Raises `PromptTooLong` when what must stay does not fit,
    and whatever counting the newest turn raises.
    """
    if not messages:
        raise InvalidRequest("'messages' must not be empty", param="messages")
    names = range(len(messages)) if keys is None else keys
    if strategy != "summary" or (running is not None and running.covers >= len(messages)):
        running = None
    return (yield from _Fitting(tuple(messages), budget, strategy, running, measured or Measured(), names).run())


class _Fitting:
    """The state of one `fit`."""

    def __init__(
        self,
        messages: Messages,
        budget: Budget,
        strategy: Strategy,
        running: Running | None,
        measured: Measured,
        keys: Sequence[Hashable],
    ) -> None:
        self.messages = messages
        self.base = budget
        self.strategy = strategy
        self.running = running
        self.measured = measured
        self.keys = keys
        self.shape = take_apart(messages)
        self.notices: list[Notice] = []
        self.folds_left = MOST_FOLDS

    @property
    def budget(self) -> Budget:
        """The caller's budget with what was learnt about pictures."""
        limits = [limit for limit in (self.base.max_media, self.measured.max_media) if limit is not None]
        return replace(self.base, max_media=min(limits, default=None))

    def run(self) -> Machine[Fitted]:
        if self.strategy == "none":
            total = yield Count(self.messages)
            decide((Cost(total),), Cost(0), self.base, "none")
            return Fitted(self.messages, total)
        newest = yield from self._newest()
        if newest.tokens > self.base.room:
            return Fitted(self._request(0, False), newest.tokens, tuple(self._dropped(0, False)), self.running)
        older = yield from self._costs(newest)
        while True:
            decision = self._decide(older, newest)
            if decision.fold:
                yield from self._fold(self._uncovered()[: decision.fold])
                older = yield from self._costs(newest)
                decision = self._decide(older, newest, "window")
            sent = yield from self._settle(decision, newest.tokens)
            if sent is not None:
                return sent

    def _newest(self) -> Machine[Cost]:
        """The cost of what must stay; of several user turns in a row the early ones may leave too if they have to."""
        shape: Shape | None = self.shape
        while True:
            fixed = self._messages(self.shape.newest)
            try:
                tokens = yield Count(fixed)
                if tokens > self.base.limit:
                    raise too_long(tokens, self.base)
            except (PromptTooLong, TooManyMedia):
                shape = self.shape.split_newest(self.messages)
                if shape is None:
                    raise
                self.shape = shape
            else:
                return Cost(tokens, count_media(fixed))

    def _uncovered(self) -> list[Exchange]:
        """The exchanges before the newest without what the running summary stands for."""
        covers = self.running.covers if self.running else 0
        left = (tuple(index for index in exchange if index >= covers) for exchange in self.shape.older)
        return [exchange for exchange in left if exchange]

    def _costs(self, newest: Cost) -> Machine[list[Cost]]:
        """The costs of `_uncovered`, counted back in time as far as they could fit, beyond that "more than fits"."""
        far = Cost(self.base.room + 1)
        exchanges = self._uncovered()
        costs: list[Cost] = []
        total = newest
        for exchange in reversed(exchanges):
            if not total.fits(self.base.room, None):
                break
            costs.append((yield from self._cost(exchange)))
            total += costs[-1]
        return [far] * (len(exchanges) - len(costs)) + costs[::-1]

    def _cost(self, exchange: Exchange) -> Machine[Cost]:
        """What an exchange adds to a prompt, by the difference that it makes in front of a tiny question."""
        messages = tuple(self.messages[index] for index in exchange)
        key = tuple(self.keys[index] for index in exchange)
        media = count_media(messages)
        if key not in self.measured.exchanges:
            try:
                if self.measured.probe is None:
                    self.measured.probe = yield Count((_PROBE,))
                tokens = yield Count((*messages, _PROBE))
                self.measured.exchanges[key] = tokens - self.measured.probe
            except InvalidRequest:  # above the model's context, or a picture that can no longer be read
                self.measured.exchanges[key] = self.base.tokens
        return Cost(self.measured.exchanges[key], media)

    def _decide(self, older: Sequence[Cost], newest: Cost, strategy: Strategy | None = None) -> Decision:
        if self.folds_left < 1:
            strategy = "window"
        tokens = self.running.tokens if self.running else None
        return decide(older, newest, self.budget, strategy or self.strategy, tokens)

    def _settle(self, decision: Decision, newest_tokens: int) -> Machine[Fitted | None]:
        """The request, counted as a whole; None when the server takes fewer pictures than thought: decide again.

        The whole may differ from the sum of its parts (texts that touch can share tokens), so exchanges leave until it
        fits.
        """
        keep, summary = decision.keep, decision.with_summary
        while True:
            messages = self._request(keep, summary)
            try:
                total = newest_tokens if not (keep or summary) else (yield Count(messages))
            except PromptTooLong:
                total = self.base.room + 1
            except TooManyMedia as error:
                if not keep:
                    raise
                self.measured.max_media = count_media(messages) - error.excess
                return None
            if total <= self.base.room:
                return Fitted(messages, total, (*self.notices, *self._dropped(keep, summary)), self.running)
            if keep:
                keep -= 1
            else:
                summary = False

    def _request(self, keep: int, summary: bool) -> Messages:
        """System messages, then the `keep` newest of the older exchanges and the newest, the summary before them."""
        kept = self._uncovered()[len(self._uncovered()) - keep :]
        indices = [*(index for exchange in kept for index in exchange), *self.shape.newest]
        if not summary or self.running is None or not indices:
            return self._messages(indices)
        first = next((index for index in indices if self.messages[index].role == "user"), indices[0])
        return self._messages(indices, first, self.running.text)

    def _messages(self, indices: Sequence[int], first: int = -1, summary: str = "") -> Messages:
        chosen = sorted([*self.shape.pinned, *indices])
        return tuple(
            with_summary(self.messages[index], summary) if index == first else self.messages[index] for index in chosen
        )

    def _dropped(self, keep: int, summary: bool) -> list[Notice]:
        uncovered = self._uncovered()
        gone = [index for exchange in uncovered[: len(uncovered) - keep] for index in exchange]
        if not summary and self.running is not None:
            gone += [i for exchange in self.shape.older for i in exchange if i < self.running.covers]
        return [self._notice("dropped", gone)] if gone else []

    def _notice(
        self, kind: Literal["summarised", "dropped", "summary_failed"], indices: Sequence[int], reason: str = ""
    ) -> Notice:
        media = count_media([self.messages[index] for index in indices])
        return Notice(kind, min(indices), max(indices) + 1, media, reason)

    def _fold(self, exchanges: Sequence[Exchange]) -> Machine[None]:
        """Fold `exchanges`, the oldest first, in as many calls as their size needs. A failure ends it, and is told."""
        waiting = list(exchanges)
        done: list[int] = []
        while waiting and self.folds_left > 0:
            self.folds_left -= 1
            try:
                number, messages = yield from self._summary_request(waiting)
                completion: Completion = yield Ask(messages, summary_sampling(self.base.summary))
                covers = waiting[number - 1][-1] + 1
                self.running = yield from self._read(completion, covers)
            except (SummaryFailed, *FAILURES) as error:
                reason = error.message if isinstance(error, QvlError) else str(error) or type(error).__name__
                self.notices.append(self._notice("summary_failed", [i for one in waiting for i in one], reason))
                self.folds_left = 0
                break
            done += [index for exchange in waiting[:number] for index in exchange]
            del waiting[:number]
        if done:
            self.notices.append(self._notice("summarised", done))

    def _read(self, completion: Completion, covers: int) -> Machine[Running]:
        text = read_summary(completion)
        if self.measured.probe is None:
            self.measured.probe = yield Count((_PROBE,))
        tokens: int = (yield Count((with_summary(_PROBE, text),))) - self.measured.probe
        if tokens > self.base.summary:
            raise SummaryFailed(f"the summary was over-long ({tokens} tokens, {self.base.summary} are allowed)")
        return Running(text, covers, tokens)

    def _summary_request(self, exchanges: Sequence[Exchange]) -> Machine[tuple[int, Messages]]:
        """How many of `exchanges` one summary call can take, and the call: at most `tokens - summary` long.

        One exchange that is too large alone goes without its pictures, then with the middle of its texts cut out.
        """
        room = self.base.tokens - self.base.summary
        number = yield from self._batch(exchanges, room)
        while number > 1:
            messages = self._summary_messages(exchanges[:number])
            if (yield from self._fits(messages, room)):
                return number, messages
            number //= 2
        messages = self._summary_messages(exchanges[:1])
        if (yield from self._fits(messages, room)):
            return 1, messages
        chars: int | None = None
        longest = max(self._chars(index) for index in exchanges[0])
        while chars is None or chars >= SHORTEST_CHARS:
            messages = self._summary_messages(exchanges[:1], with_media=False, max_chars=chars)
            if (yield from self._fits(messages, room)):
                return 1, messages
            chars = longest // 2 if chars is None else chars // 2
        raise SummaryFailed("the turns do not fit into a request of their own")

    def _batch(self, exchanges: Sequence[Exchange], room: int) -> Machine[int]:
        """How many of the oldest fit by their own costs, at least one; the frame around them is counted afterwards."""
        total = Cost(self.running.tokens if self.running else 0)
        for number, exchange in enumerate(exchanges):
            total += yield from self._cost(exchange)
            if not total.fits(room, self.budget.max_media):
                return max(1, number)
        return len(exchanges)

    def _fits(self, messages: Messages, room: int) -> Machine[bool]:
        try:
            tokens: int = yield Count(messages)
        except InvalidRequest:  # too long, too many pictures, or one that can no longer be read
            return False
        return tokens <= room

    def _summary_messages(
        self, exchanges: Sequence[Exchange], *, with_media: bool = True, max_chars: int | None = None
    ) -> Messages:
        fold = [index for exchange in exchanges for index in exchange]
        previous = self.running.text if self.running else ""
        return summary_messages(
            self.messages, fold, previous, self.base.summary, with_media=with_media, max_chars=max_chars
        )

    def _chars(self, index: int) -> int:
        return max((len(p.text) for p in self.messages[index].parts if isinstance(p, TextPart)), default=0)
