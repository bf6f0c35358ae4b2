"""Which pictures a step encodes, and how long each is kept.

A sequence pins the pictures that its next tokens need, from the step that encodes them (or finds them in the cache) to
the one behind their last token. Knows sequences, budgets and the encoder cache. Does not know pixels or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from qvl.engine.batch import ScheduledBatch
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.sequence import Sequence
from qvl.engine.step import SchedulerConfig, Step


class Pictures:
    """The scheduler's part that plans the vision tower. `waiting` is the scheduler's list, `count` its counters."""

    def __init__(
        self,
        config: SchedulerConfig,
        cache: EncoderCache[Any],
        waiting: list[Sequence],
        count: Callable[[str, int], None],
    ) -> None:
        self.config = config
        self.cache = cache
        self._waiting = waiting
        self._count = count

    def prepare(self, seq: Sequence, num_tokens: int, step: Step) -> int:
        """Have the pictures of the next `num_tokens` tokens encoded; returns how many of these may be computed.

        The range stops before the first picture that must wait, because of a budget or of a cache full of pinned ones.
        """
        start = seq.num_computed
        for index in seq.spans_in(start, num_tokens):
            if index not in seq.pinned and not self._encode(seq, index, step):
                return max(0, seq.spans[index].offset - start)
        return num_tokens

    def encode_ahead(self, step: Step, coming: Iterable[tuple[Sequence, int]]) -> None:
        """Pictures that come next go along with those of this step, as far as its budget reaches: four small ones cost
        the tower less than three alone. `coming`: sequences, and from which token on they will be computed. Half of the
        cache is left to those that cannot go on without.
        """
        for seq, start in coming:
            for index in seq.spans_in(start, seq.num_prompt_tokens - start):
                span = seq.spans[index]
                if span.digest in self.cache:
                    continue
                if span.length > step.encoder_left or not self.cache.has_room_ahead(self._bytes_of(seq, index)):
                    return
                self._encode(seq, index, step)

    def _encode(self, seq: Sequence, index: int, step: Step) -> bool:
        """Pin a picture that is in the cache, or put it into this step's encode list."""
        span = seq.spans[index]
        if span.digest in self.cache:
            self.cache.pin(span.digest, (seq.request_id, index))
            self._count("encoder_hits", 1)
        else:
            if not step.room_to_encode(span.length) or not self._reserve(seq, index):
                return False
            step.encode(seq, index)
            self._count("encoded_tokens", span.length)
        self._count("encoder_queries", 1)
        seq.pinned.add(index)
        return True

    def _reserve(self, seq: Sequence, index: int) -> bool:
        """Room for a picture that a step needs. For that, who waits gives back what was encoded ahead for it."""
        while not self.cache.reserve(seq.spans[index].digest, self._bytes_of(seq, index), (seq.request_id, index)):
            owner = next((other for other in reversed(self._waiting) if other.pinned and other is not seq), None)
            if owner is None:
                return False
            self.release(owner)
        return True

    def _bytes_of(self, seq: Sequence, index: int) -> int:
        return seq.spans[index].length * self.config.embedding_bytes_per_token

    def finish(self, batch: ScheduledBatch) -> None:
        """Forget what the step could not encode; who was to have it ahead will ask again."""
        for media in batch.encode:
            if not self.cache.is_filled(media.span.digest):
                self.cache.drop(media.span.digest)
                media.seq.pinned.discard(media.index)

    def release(self, seq: Sequence, end: int | None = None) -> None:
        """Let go of the pictures of a sequence, or of those that lie before token `end`."""
        for index in [index for index in seq.pinned if end is None or seq.spans[index].end <= end]:
            seq.pinned.remove(index)
            self.cache.unpin(seq.spans[index].digest, (seq.request_id, index))
