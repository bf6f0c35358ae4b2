"""The block manager against a dictionary model that knows no free lists, under random operations."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qvl.engine.block_manager import BlockManager
from qvl.prompt import OPENING_ID_BYTES, Opening

NUM_BLOCKS = 7


class Model(RuleBasedStateMachine):
    """The model: who holds what (lists), which key a block carries, and when each block was last let go."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS, 4)
        self.held: list[list[int]] = []
        self.key_of: dict[int, bytes] = {}
        self.freed_at: dict[int, int] = {}
        self.clock = 0

    def in_use(self) -> set[int]:
        return {block for table in self.held for block in table}

    def prefix(self, keys: list[bytes]) -> list[int]:
        blocks: list[int] = []
        for key in keys:
            owner = [block for block, k in self.key_of.items() if k == key]
            if not owner:
                break
            blocks += owner
        return blocks

    @rule(chain=st.lists(st.integers(0, 5), max_size=4, unique=True), num_new=st.integers(0, 4), keep=st.integers(0, 2))
    def take(self, chain: list[int], num_new: int, keep: int) -> None:
        keys = [bytes([number]) for number in chain]
        hits = self.manager.lookup(keys)
        assert hits == self.prefix(keys)
        free = set(range(NUM_BLOCKS)) - self.in_use() - set(hits)
        taken = self.manager.take(hits, num_new, keep_free=keep)
        if len(free) - num_new < keep:
            assert taken is None
            return
        assert taken is not None
        assert taken[: len(hits)] == hits
        new = taken[len(hits) :]
        assert len(new) == len(set(new)) == num_new
        assert set(new) <= free
        spared = [block for block in free - set(new) if block in self.key_of]
        for block in new:
            if (
                self.key_of.pop(block, None) is not None
            ):  # a cached block went: no blank one was left, and it was the oldest
                assert all(other in self.key_of for other in free - set(new))
                assert all(self.freed_at[block] < self.freed_at[other] for other in spared)
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.manager.free(table)
        for block in reversed(table):
            self.clock += 1
            if block not in self.in_use():
                self.freed_at[block] = self.clock

    @precondition(lambda self: self.in_use())
    @rule(data=st.data(), number=st.integers(0, 5))
    def register(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(self.in_use())))
        self.manager.register(block, bytes([number]))
        if block not in self.key_of and bytes([number]) not in self.key_of.values():
            self.key_of[block] = bytes([number])

    @invariant()
    def agrees(self) -> None:
        self.manager.check_integrity()
        assert self.manager.num_used == len(self.in_use())
        for number in range(6):
            assert self.manager.lookup([bytes([number])]) == self.prefix([bytes([number])])


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAgainstModel = Model.TestCase


def test_a_refused_take_changes_nothing() -> None:
    manager = BlockManager(3, 4)
    table = manager.take((), 2)
    assert table is not None
    manager.register(table[0], b"a")
    manager.free(table)
    hits = manager.lookup([b"a"])
    assert manager.take(hits, 3) is None
    assert manager.take(hits, 2, keep_free=1) is None
    assert manager.num_free == 3
    assert manager.take(hits, 2) is not None


def test_a_prefix_outlives_what_follows_it() -> None:
    manager = BlockManager(4, 4)
    table = manager.take((), 4)
    assert table is not None
    for block, key in zip(table, (b"a", b"b", b"c", b"d"), strict=True):
        manager.register(block, key)
    manager.free(table)
    manager.take((), 2)
    assert len(manager.lookup([b"a", b"b", b"c", b"d"])) == 2


def test_without_prefix_caching_nothing_is_found() -> None:
    manager = BlockManager(2, 4, enable_prefix_caching=False)
    table = manager.take((), 1)
    assert table is not None
    manager.register(table[0], b"a")
    assert manager.lookup([b"a"]) == []


def test_an_opening_is_found_as_long_as_its_block() -> None:
    manager = BlockManager(2, 4)
    table = manager.take((), 2)
    assert table is not None
    opening = Opening(b"family", b"".join(number.to_bytes(OPENING_ID_BYTES, "big") for number in (1, 2, 3, 4)))
    for block, key in zip(table, (b"a", b"b"), strict=True):
        manager.register(block, key, opening)
    manager.register(table[0], b"c", Opening(b"other", opening.ids))  # it has a key already
    begin = Opening(b"family", opening.ids[: 3 * OPENING_ID_BYTES])
    manager.free(table)
    found, num_shared = manager.lookup_opening(begin)
    assert found in table and num_shared == 3
    assert manager.lookup_opening(Opening(b"other", begin.ids)) == (0, 0)
    manager.take((), 1)
    manager.check_integrity()
    assert manager.lookup_opening(begin) == (table[0], 3)


def test_a_block_cannot_be_freed_twice() -> None:
    manager = BlockManager(2, 4)
    table = manager.take((), 1)
    assert table is not None
    manager.free(table)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(table)
