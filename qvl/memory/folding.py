"""Older turns into one running summary, in as many requests as their size needs, each of which fits.

Knows how a summary is asked for step by step, and what is no summary. Does not know which turns are folded or why.
"""

from __future__ import annotations

from collections.abc import Sequence

from qvl.errors import InvalidRequest, QvlError
from qvl.memory.costs import Costs
from qvl.memory.steps import FAILURES, Ask, Count, Machine, Messages
from qvl.memory.summary import Running, SummaryFailed, read_summary, summary_messages, summary_sampling
from qvl.memory.window import Budget, Cost, Exchange
from qvl.types import Completion, TextPart

MOST_FOLDS = 8  # summary calls before one answer; what is left over is folded before the next answers
SHORTEST_CHARS = 64  # a text that is cut shorter than this for its summary says nothing any more


class Folding:
    """The running summary of one `fit`, and how often the model may still be asked for a new one."""

    def __init__(self, costs: Costs, budget: Budget, running: Running | None) -> None:
        self.running = running
        self.folds_left = MOST_FOLDS
        self._costs = costs
        self._budget = budget

    def fold(self, exchanges: Sequence[Exchange]) -> Machine[tuple[int, str]]:
        """Fold `exchanges`, the oldest first. How many were folded, and why not all of them ("" where nothing failed).

        After a failure nothing is asked any more.
        """
        done = 0
        while done < len(exchanges) and self.folds_left > 0:
            self.folds_left -= 1
            try:
                number, messages = yield from self._request(exchanges[done:])
                completion: Completion = yield Ask(messages, summary_sampling(self._budget.summary))
                self.running = yield from self._read(completion, exchanges[done + number - 1][-1] + 1)
            except (SummaryFailed, *FAILURES) as error:
                self.folds_left = 0
                return done, error.message if isinstance(error, QvlError) else str(error) or type(error).__name__
            done += number
        return done, ""

    def _read(self, completion: Completion, covers: int) -> Machine[Running]:
        text = read_summary(completion)
        tokens = yield from self._costs.of_summary(text)
        if tokens > self._budget.summary:
            raise SummaryFailed(f"the summary was over-long ({tokens} tokens, {self._budget.summary} are allowed)")
        return Running(text, covers, tokens)

    def _request(self, exchanges: Sequence[Exchange]) -> Machine[tuple[int, Messages]]:
        """How many of `exchanges` one summary call can take, and the call: at most `tokens - summary` long.

        One exchange that is too large alone goes without its pictures, then with the middle of its texts cut out.
        """
        room = self._budget.tokens - self._budget.summary
        number = yield from self._batch(exchanges, room)
        while number > 1:
            messages = self._messages(exchanges[:number])
            if (yield from self._fits(messages, room)):
                return number, messages
            number //= 2
        messages = self._messages(exchanges[:1])
        if (yield from self._fits(messages, room)):
            return 1, messages
        chars: int | None = None
        longest = max(self._chars(index) for index in exchanges[0])
        while chars is None or chars >= SHORTEST_CHARS:
            messages = self._messages(exchanges[:1], with_media=False, max_chars=chars)
            if (yield from self._fits(messages, room)):
                return 1, messages
            chars = longest // 2 if chars is None else chars // 2
        raise SummaryFailed("the turns do not fit into a request of their own")

    def _batch(self, exchanges: Sequence[Exchange], room: int) -> Machine[int]:
        """How many of the oldest fit by their own costs, at least one; the frame around them is counted afterwards."""
        total = Cost(self.running.tokens if self.running else 0)
        for number, exchange in enumerate(exchanges):
            total += yield from self._costs.of(exchange)
            if not total.fits(room, self._costs.budget.max_media):
                return max(1, number)
        return len(exchanges)

    def _fits(self, messages: Messages, room: int) -> Machine[bool]:
        try:
            tokens: int = yield Count(messages)
        except InvalidRequest:  # too long, too many pictures, or one that can no longer be read
            return False
        return tokens <= room

    def _messages(
        self, exchanges: Sequence[Exchange], *, with_media: bool = True, max_chars: int | None = None
    ) -> Messages:
        fold = [index for exchange in exchanges for index in exchange]
        previous = self.running.text if self.running else ""
        return summary_messages(
            self._costs.messages, fold, previous, self._budget.summary, with_media=with_media, max_chars=max_chars
        )

    def _chars(self, index: int) -> int:
        parts = self._costs.messages[index].parts
        return max((len(part.text) for part in parts if isinstance(part, TextPart)), default=0)
