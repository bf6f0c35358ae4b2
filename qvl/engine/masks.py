"""Which tokens every constrained row of a step may choose, computed by threads while the device computes the scores.

Knows the grammars of the sequences, what else is banned, and that a grammar must not hold up everybody: one that takes
too long fails its own request. Does not know how a grammar works, nor devices. A step without a constrained row does
nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from qvl.engine.batch import ScheduledSeq
from qvl.engine.grammar import Words, token_words

MOST_SECONDS = 1.0  # for all rows of a step, after the scores are there; usually it is less than a millisecond
TOO_SLOW = "the constraint on this answer has become too complex to compute in time"
DEAD_END = "the constraint on this answer leaves no token that may be generated"


class Masks:
    """`ends`: the end tokens. `never`: tokens that no answer may have."""

    def __init__(self, vocab_size: int, *, ends: Iterable[int], never: Iterable[int]) -> None:
        self._num_words = -(-vocab_size // 32)
        self.ends = self.words_of(ends)
        self.allowed = ~self.words_of(never)
        self._buffer = np.zeros((0, self._num_words), dtype=np.int32)
        self._pool: ThreadPoolExecutor | None = None

    def words_of(self, token_ids: Iterable[int]) -> Words:
        return token_words(token_ids, self._num_words)

    def start(self, sampling: Sequence[ScheduledSeq]) -> Masking | None:
        """Begin; `sampling` are the step's rows in their order. None when none of them is constrained.

        All their tokens must be known by now: a grammar allows what may follow the last one.
        """
        rows = [i for i, entry in enumerate(sampling) if entry.seq.grammar is not None]
        if not rows:
            return None
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "qvl-masks")
        if len(self._buffer) < len(rows):
            self._buffer = np.zeros((len(rows), self._num_words), dtype=np.int32)
        words = self._buffer[: len(rows)]
        futures = []
        for line, row in zip(words, rows, strict=True):
            grammar = sampling[row].seq.grammar
            assert grammar is not None
            futures.append(self._pool.submit(grammar.fill, line, self.ends))
        return Masking(self, [sampling[row] for row in rows], rows, words, futures)

    def abandon(self) -> None:
        """A thread is late: it will write into the buffer yet, and nobody shall wait behind it."""
        self._buffer = np.zeros((0, self._num_words), dtype=np.int32)
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


@dataclass(slots=True)
class Masking:
    """The masks of one step, under way. `errors` says after `gather` which requests cannot go on, and why.

    `rows` are the places of the constrained `entries` among those that sample.
    """

    masks: Masks
    entries: list[ScheduledSeq]
    rows: list[int]
    words: Words
    futures: list[Future[str | None]]
    errors: dict[str, str] = field(default_factory=dict)

    def gather(self) -> dict[int, Words]:
        """What each constrained row may choose, a bit per token. Waits for the threads.

        Every line has at least one bit that may be sampled; one that failed has all: what it chooses is thrown away.
        """
        late = {future for future in wait(self.futures, MOST_SECONDS).not_done if not future.cancel()}
        words = self.words
        if late:
            self.masks.abandon()
            words = words.copy()
        for entry, line, future in zip(self.entries, words, self.futures, strict=True):
            error = TOO_SLOW if future in late else self._fill(entry, line, future) or self._finish(entry, line)
            if error is not None:
                self.errors[entry.seq.request_id] = error
                line.fill(-1)
        return dict(zip(self.rows, words, strict=True))

    def _fill(self, entry: ScheduledSeq, line: Words, future: Future[str | None]) -> str | None:
        """What the thread found; a row that only stood behind a late one is computed here."""
        if not future.cancelled():
            return future.result()
        assert entry.seq.grammar is not None
        return entry.seq.grammar.fill(line, self.masks.ends)

    def _finish(self, entry: ScheduledSeq, line: Words) -> str | None:
        """Take out what the model never says, and what must not come yet while anything else may."""
        np.bitwise_and(line, self.masks.allowed, out=line)
        banned = entry.seq.sampling.banned(entry.end - entry.seq.num_prompt_tokens)
        if banned:
            rest = line & ~self.masks.words_of(banned)
            if rest.any():
                line[:] = rest
        return None if line.any() else DEAD_END
