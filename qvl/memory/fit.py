"""One conversation into one request that fits: a state machine that asks for counts and summaries and makes no calls.

So a synchronous client, an asynchronous one, a model in this process and a server drive the same rules (`steps.drive`,
`steps.adrive`). Needs messages and counts; does not know stores, sockets or tokenizers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

from qvl.errors import InvalidRequest, PromptTooLong, TooManyMedia
from qvl.memory.costs import Costs, Measured
from qvl.memory.folding import Folding
from qvl.memory.steps import Count, Machine, Messages
from qvl.memory.summary import Running, with_summary
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
from qvl.types import Message


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
    costs = Costs(tuple(messages), names, budget, measured or Measured())
    return (yield from _Fitting(tuple(messages), budget, strategy, running, costs).run())


class _Fitting:
    """The state of one `fit`."""

    def __init__(self, messages: Messages, budget: Budget, strategy: Strategy, running: Running | None, costs: Costs):
        self.messages = messages
        self.base = budget
        self.strategy = strategy
        self.costs = costs
        self.folding = Folding(costs, budget, running)
        self.shape = take_apart(messages)
        self.notices: list[Notice] = []

    @property
    def running(self) -> Running | None:
        """The summary so far."""
        return self.folding.running

    def run(self) -> Machine[Fitted]:
        if self.strategy == "none":
            total = yield Count(self.messages)
            decide((Cost(total),), Cost(0), self.base, "none")
            return Fitted(self.messages, total)
        newest = yield from self._newest()
        if newest.tokens > self.base.room:
            return Fitted(self._request(0, False), newest.tokens, tuple(self._dropped(0, False)), self.running)
        older = yield from self.costs.of_newest(self._uncovered(), newest)
        while True:
            decision = self._decide(older, newest)
            if decision.fold:
                yield from self._fold(self._uncovered()[: decision.fold])
                older = yield from self.costs.of_newest(self._uncovered(), newest)
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

    def _decide(self, older: Sequence[Cost], newest: Cost, strategy: Strategy | None = None) -> Decision:
        if self.folding.folds_left < 1:
            strategy = "window"
        tokens = self.running.tokens if self.running else None
        cut = self.costs.measured.cut
        stayed = None if cut is None else sum(exchange[0] >= cut for exchange in self._uncovered())
        return decide(older, newest, self.costs.budget, strategy or self.strategy, tokens, stayed)

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
                self.costs.measured.max_media = count_media(messages) - error.excess
                return None
            if total <= self.base.room:
                notices = (*self.notices, *self._dropped(keep, summary))
                self.costs.measured.cut = self._kept(keep)[0] if keep < len(self._uncovered()) else None
                return Fitted(messages, total, notices, self.running)
            if keep:
                keep -= 1
            else:
                summary = False

    def _kept(self, keep: int) -> list[int]:
        """The indices of the `keep` newest of the older exchanges, and of the newest."""
        uncovered = self._uncovered()
        return [*(index for exchange in uncovered[len(uncovered) - keep :] for index in exchange), *self.shape.newest]

    def _request(self, keep: int, summary: bool) -> Messages:
        """System messages, then what is kept, the summary before it."""
        indices = self._kept(keep)
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
        """Fold `exchanges` and note what came of it."""
        number, failure = yield from self.folding.fold(exchanges)
        done, left = (
            [index for exchange in part for index in exchange] for part in (exchanges[:number], exchanges[number:])
        )
        if failure:
            self.notices.append(self._notice("summary_failed", left, failure))
        if done:
            self.notices.append(self._notice("summarised", done))
