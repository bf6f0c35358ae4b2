"""Who owns which block of the paged KV cache.

                     take                    free, no key
    blank  ------------------------> held  ---------------> blank
    cached ---- take (as a hit) ---> held  ---------------> cached     free, with a key: the newest end of the LRU order
    cached ---- take (as new) -----> held                              the oldest one is taken, its key forgotten

Knows block numbers, reference counts, prefix keys and openings. Does not know sequences or memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from qvl.engine.openings import Openings
from qvl.prompt import Opening


class BlockManager:
    """`num_blocks` blocks of `block_size` tokens, each blank, cached (unused, but its key can be found) or held."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._refs = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._openings = Openings()

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def lookup(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks of the longest prefix of `keys` that is present, held by others or not. Takes nothing."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def lookup_opening(self, opening: Opening) -> tuple[int, int]:
        """The block whose first tokens are most like those of `opening`, and how many: 0 for none. Takes nothing."""
        return self._openings.find(opening)

    def take(self, hits: Sequence[int], num_new: int, keep_free: int = 0) -> list[int] | None:
        """Hold the blocks `hits` (just returned by `lookup`) and `num_new` others: `hits` followed by these.

        None, with nothing changed, when fewer than `keep_free` free blocks would be left.
        """
        idle_hits = sum(1 for block in hits if self._refs[block] == 0)
        if self.num_free - idle_hits - num_new < keep_free:
            return None
        for block in hits:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
        return [*hits, *(self._take_new() for _ in range(num_new))]

    def _take_new(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._openings.remove(block)
        self._refs[block] = 1
        return block

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks. Its tail will be forgotten first: a prefix is of use to more sequences."""
        for block in reversed(blocks):
            assert self._refs[block] > 0, f"block {block} freed twice"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._key_of:
                    self._cached[block] = None
                else:
                    self._blank.append(block)

    def register(self, block: int, key: bytes, opening: Opening | None = None) -> None:
        """Make a held, fully computed block findable, by its `opening` as well if it has one.

        Where another block already has this key, that one stays.
        """
        if self.enable_prefix_caching and key not in self._block_of and block not in self._key_of:
            assert self._refs[block] > 0, f"block {block} registered but not held"
            self._block_of[key] = block
            self._key_of[block] = key
            if opening is not None:
                self._openings.add(block, opening)

    def check_integrity(self) -> None:
        """Every block is in exactly one state and both key maps agree; meant for tests and for idle moments."""
        held = {block for block, refs in enumerate(self._refs) if refs > 0}
        blank, cached = set(self._blank), set(self._cached)
        assert min(self._refs, default=0) >= 0
        assert len(blank) == len(self._blank), "a blank block is listed twice"
        assert len(held) + len(blank) + len(cached) == self.num_blocks, "a block is lost or in two states"
        assert held | blank | cached == set(range(self.num_blocks))
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        assert cached <= self._key_of.keys(), "a cached block has no key"
        assert not blank & self._key_of.keys(), "a blank block has a key"
        assert len(self._openings) == sum(block in self._openings for block in self._key_of), "an opening without a key"
