"""Conversations that come whole with every request, a little longer each time, known again by how they begin.

What was found out about an earlier request is found again for a later one: the tokens of exchanges, the summaries of
the turns that both begin with, and where they were cut. Only who sends the same turns (and the same salt) meets their
summary. Knows digests and bounds. Does not know backends, budgets or what a summary says.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qvl.memory.costs import Measured
from qvl.memory.summary import Running
from qvl.types import ChatRequest, Message, TextPart

MOST_EXCHANGES = 100_000  # an integer each
MOST_BEGINNINGS = 4096  # with a summary of some kilobytes each
_DIGEST_BYTES = 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Names:
    """The messages of one request by what they say: `messages[i]` alone, `beginnings[i]` of the first i of them.

    System messages do not count in a beginning: they are not summarised, and some programs write the time there.
    """

    messages: tuple[bytes, ...]
    beginnings: tuple[bytes, ...]


def names_of(request: ChatRequest) -> Names:
    """Reads every byte of the request: for a thread. Pictures by address count as the same while their address is."""
    setting = repr((request.limits, request.add_vision_id, request.cache_salt)).encode()
    messages = tuple(_digest(setting, *_pieces(message)) for message in request.messages)
    beginnings = [_digest(setting)]
    for message, name in zip(request.messages, messages, strict=True):
        before = beginnings[-1]
        beginnings.append(before if message.role == "system" else _digest(before, name))
    return Names(messages, tuple(beginnings))


def _pieces(message: Message) -> Iterator[bytes]:
    yield message.role.encode()
    for part in message.parts:
        if isinstance(part, TextPart):
            yield b"text"
            yield part.text.encode("utf-8", "surrogatepass")
        else:
            yield repr((part.kind, part.limits)).encode()
            source = part.source if isinstance(part.source, str) else repr(part.source)
            yield source.encode("utf-8", "surrogatepass")


def _digest(*pieces: bytes) -> bytes:
    """Of the pieces, each with its length, so that none of them can pass for two."""
    state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for piece in pieces:
        state.update(len(piece).to_bytes(8, "little"))
        state.update(piece)
    return state.digest()


class Growing:
    """What one server remembers of the conversations that went through it. For one thread."""

    def __init__(self) -> None:
        self._exchanges = Measured().exchanges
        self._summaries: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self._cuts: OrderedDict[bytes, None] = OrderedDict()
        self._rooms: OrderedDict[bytes, int] = OrderedDict()

    def running(self, beginnings: Sequence[bytes]) -> Running | None:
        """The summary that stands for the most of the first messages, where there is one."""
        covers = _longest(beginnings, self._summaries)
        if covers is None:
            return None
        text, tokens = self._summaries[beginnings[covers]]
        return Running(text, covers, tokens)

    def measured(self, beginnings: Sequence[bytes]) -> Measured:
        """For one `fit` whose `keys` are `Names.messages`. What a server takes at most is found out by each anew."""
        if len(self._exchanges) > MOST_EXCHANGES:
            self._exchanges.clear()
        return Measured(self._exchanges, cut=_longest(beginnings, self._cuts))

    def is_long(self, beginnings: Sequence[bytes], room: int) -> bool:
        """Whether a conversation that begins so was too long for as much room: nobody counts all of it again."""
        length = _longest(beginnings, self._rooms)
        return length is not None and room <= self._rooms[beginnings[length]]

    def remember(self, beginnings: Sequence[bytes], running: Running | None, cut: int | None, room: int) -> None:
        """For the next request that begins with the same turns: their summary, and from where on they were sent.

        `room`: tokens for which the whole was too long.
        """
        if running is not None:
            _keep(self._summaries, beginnings[running.covers], (running.text, running.tokens))
        if cut is not None:
            _keep(self._cuts, beginnings[cut], None)
        left = max(cut or 0, running.covers if running else 0)
        if left:
            _keep(self._rooms, beginnings[left], room)


def _longest(beginnings: Sequence[bytes], known: OrderedDict[bytes, T]) -> int | None:
    """How many messages the longest known one of `beginnings` has."""
    return next((length for length in range(len(beginnings) - 1, 0, -1) if beginnings[length] in known), None)


def _keep(known: OrderedDict[bytes, T], beginning: bytes, value: T) -> None:
    """What was not kept again for the longest time leaves."""
    known[beginning] = value
    known.move_to_end(beginning)
    while len(known) > MOST_BEGINNINGS:
        known.popitem(last=False)
