"""Blocks that begin alike, against a comparison with every block there is."""

from __future__ import annotations

import random

from qvl.engine.openings import Openings
from qvl.prompt import OPENING_ID_BYTES, Opening


def opening(family: int, ids: list[int]) -> Opening:
    return Opening(bytes([family]), b"".join(number.to_bytes(OPENING_ID_BYTES, "big") for number in ids))


def shared(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def test_the_longest_beginning_is_found_while_blocks_come_and_go() -> None:
    rng = random.Random(5)
    openings = Openings()
    known: dict[int, tuple[int, list[int]]] = {}

    def draw() -> tuple[int, list[int]]:
        return rng.randrange(3), [rng.choice((1, 2, 255, 256, 151_000)) for _ in range(rng.randint(0, 4))]

    for number in range(3_000):
        if known and rng.random() < 0.45:
            block = rng.choice(sorted(known))
            del known[block]
            openings.remove(block)
            openings.remove(block)  # twice is no harm
            assert block not in openings
        else:
            known[number] = draw()
            openings.add(number, opening(*known[number]))
        assert len(openings) == len(known)
        family, ids = draw()
        block, length = openings.find(opening(family, ids))
        most = max((shared(ids, other) for owner, other in known.values() if owner == family), default=0)
        assert length == most
        if length:
            owner, other = known[block]
            assert owner == family and other[:length] == ids[:length]
