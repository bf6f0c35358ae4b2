"""Blocks that begin alike: which cached block shares the most tokens with one that is to be computed.

A prefix cache of whole blocks never finds a template of 14 tokens. Here the blocks that follow the same prefix are kept
sorted by their tokens, so that the longest beginning in common stands next to where a new one would stand.

Knows `Opening`s and block numbers. Does not know who holds a block, sequences, or memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import takewhile

from qvl.prompt import OPENING_ID_BYTES, Opening


class Openings:
    """The openings of the blocks that can be found; each block has one at most."""

    def __init__(self) -> None:
        self._families: dict[bytes, list[tuple[bytes, int]]] = {}  # sorted by the ids
        self._opening_of: dict[int, Opening] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._opening_of

    def __len__(self) -> int:
        return len(self._opening_of)

    def add(self, block: int, opening: Opening) -> None:
        self._opening_of[block] = opening
        insort(self._families.setdefault(opening.family, []), (opening.ids, block))

    def remove(self, block: int) -> None:
        """Forget a block; nothing happens when it is not known."""
        opening = self._opening_of.pop(block, None)
        if opening is None:
            return
        members = self._families[opening.family]
        del members[bisect_left(members, (opening.ids, block))]
        if not members:
            del self._families[opening.family]

    def find(self, opening: Opening) -> tuple[int, int]:
        """The block that begins most like `opening`, and how many tokens they share: 0 when nothing is in common."""
        members = self._families.get(opening.family, [])
        at = bisect_left(members, (opening.ids,))
        best = (0, 0)
        for ids, block in members[max(0, at - 1) : at + 1]:
            best = max(best, (_num_shared(ids, opening.ids), block))
        return best[1], best[0]


def _num_shared(one: bytes, other: bytes) -> int:
    """How many ids two openings have in common before the first that differs."""
    pairs = zip(_ids(one), _ids(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _ids(opening: bytes) -> Iterator[bytes]:
    return (opening[at : at + OPENING_ID_BYTES] for at in range(0, len(opening), OPENING_ID_BYTES))
