"""What the exchanges of one conversation take, counted once each and remembered. Decides nothing."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from qvl.errors import InvalidRequest
from qvl.memory.steps import Count, Machine, Messages
from qvl.memory.summary import with_summary
from qvl.memory.window import Budget, Cost, Exchange, count_media
from qvl.types import Message, TextPart

_PROBE = Message("user", (TextPart("."),))


@dataclass(slots=True)
class Measured:
    """What earlier calls of `fit` for the same conversation and model found out. Give it back to save counting.

    `exchanges`: the tokens that an exchange adds to a prompt, by the keys of its messages. `max_media`: the most
    pictures of one request, learnt from a refusal. `cut`: the index of the first message that stayed when the oldest
    turns were left out.
    """

    exchanges: dict[tuple[Hashable, ...], int] = field(default_factory=dict)
    probe: int | None = None
    max_media: int | None = None
    cut: int | None = None


class Costs:
    """Counts for one `fit`: `keys[i]` names `messages[i]` in `measured`."""

    def __init__(self, messages: Messages, keys: Sequence[Hashable], budget: Budget, measured: Measured) -> None:
        self.messages = messages
        self.measured = measured
        self._keys = keys
        self._base = budget

    @property
    def budget(self) -> Budget:
        """The caller's budget with what was learnt about pictures."""
        limits = [limit for limit in (self._base.max_media, self.measured.max_media) if limit is not None]
        return replace(self._base, max_media=min(limits, default=None))

    def of(self, exchange: Exchange) -> Machine[Cost]:
        """What an exchange adds to a prompt, by the difference that it makes in front of a tiny question."""
        messages = tuple(self.messages[index] for index in exchange)
        key = tuple(self._keys[index] for index in exchange)
        if key not in self.measured.exchanges:
            try:
                probe = yield from self._probe()
                tokens = yield Count((*messages, _PROBE))
                self.measured.exchanges[key] = tokens - probe
            except InvalidRequest:  # above the model's context, or a picture that can no longer be read
                self.measured.exchanges[key] = self._base.tokens
        return Cost(self.measured.exchanges[key], count_media(messages))

    def of_newest(self, exchanges: Sequence[Exchange], fixed: Cost) -> Machine[list[Cost]]:
        """The costs of all, counted back in time as far as they fit beside `fixed`, beyond that "more than fits"."""
        costs: list[Cost] = []
        for exchange in reversed(exchanges):
            if not fixed.fits(self._base.room, None):
                break
            costs.append((yield from self.of(exchange)))
            fixed += costs[-1]
        return [Cost(self._base.room + 1)] * (len(exchanges) - len(costs)) + costs[::-1]

    def of_summary(self, text: str) -> Machine[int]:
        """The tokens that a summary adds to a prompt, with its frame."""
        probe = yield from self._probe()
        tokens: int = yield Count((with_summary(_PROBE, text),))
        return tokens - probe

    def _probe(self) -> Machine[int]:
        if self.measured.probe is None:
            self.measured.probe = yield Count((_PROBE,))
        return self.measured.probe
