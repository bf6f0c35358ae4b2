"""How the rules of choosing tokens are laid out for a kernel. Knows words and bits; Triton need not be there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# A row's rules are FIELDS 32-bit words; those from SCALE on are floats.
INDEX = 0  # its row of the logits
KIND = 1  # GREEDY, FREE or FILTERED
LINE = 2  # its line of counts, -1: no penalties
MASK = 3  # where its mask lies among all words, -1: none of its own
ITEMS = 4  # where its items lie
NUM_ITEMS = 5
KEY = 6  # two words that its noise comes from
TOP_K = 8  # 0: none
SCALE = 9  # 1 / temperature
TOP_P = 10  # 1: none
LOG_MIN_P = 11  # -inf: none
REPETITION = 12
PRESENCE = 13
FREQUENCY = 14
FIELDS = 16

GREEDY, FREE, FILTERED = range(3)


@dataclass(frozen=True, slots=True)
class Rules:
    """Rows with rules, on the device.

    `words` int32: FIELDS for each of `rows`, then items, two words each: a token, and as bits what is added to its
    score; then masks, a bit per token that may be chosen. `counts` int16 [lines, vocab] of `TokenCounts`. `filters`:
    whether any row is FILTERED; `narrows`: whether any has a top_k or a top_p.
    """

    words: Tensor
    rows: int
    counts: Tensor
    filters: bool
    narrows: bool
