"""A step while it is planned: the batch so far, and what is left of the budgets.

Knows how a planned token changes its sequence. Does not decide which ones are planned: that is the scheduler's part.
"""

from __future__ import annotations

from typing import Protocol

from qvl.engine.batch import ScheduledBatch, ScheduledMedia, ScheduledSeq
from qvl.engine.sequence import Sequence


class SchedulerConfig(Protocol):
    """What the scheduler needs of `EngineConfig`."""

    @property
    def max_model_len(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_num_mixed_tokens(self) -> int: ...
    @property
    def encoder_budget_tokens(self) -> int: ...
    @property
    def embedding_bytes_per_token(self) -> int: ...


class Step:
    """The batch under construction and what is left of the budgets."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.batch = ScheduledBatch()
        self.tokens_left = config.max_num_batched_tokens
        self.encoder_left = config.encoder_budget_tokens
        self.preempted = False
        self.unprepared = False  # somebody's grammar or picture is still to come
        self._members: set[str] = set()

    def __contains__(self, seq: Sequence) -> bool:
        return seq.request_id in self._members

    def add_decode(self, seq: Sequence) -> None:
        """`add` of the one token that is left, for hundreds in every step."""
        self.batch.seqs.append(ScheduledSeq(seq, seq.num_computed, 1, True))
        self._members.add(seq.request_id)
        self.tokens_left -= 1
        seq.num_computed += 1
        seq.num_pending += 1

    def add(self, seq: Sequence, num_tokens: int) -> None:
        samples = num_tokens == seq.num_to_compute
        self.batch.seqs.append(ScheduledSeq(seq, seq.num_computed, num_tokens, samples))
        self._members.add(seq.request_id)
        self.tokens_left -= num_tokens
        seq.num_computed += num_tokens
        seq.num_pending += samples

    def keep_decodes_moving(self, num_tokens: int) -> None:
        """A batch with decodes takes no more than `num_tokens`, decodes counted: matrices are fastest when their rows
        fill whole tiles. Prompts may always have a quarter of them. As many tokens of pictures are encoded.
        """
        if self.batch.seqs:
            prompts = max(num_tokens - len(self.batch.seqs), -(-num_tokens // 4))
            self.tokens_left = min(self.tokens_left, prompts)
            self.encoder_left = min(self.encoder_left, num_tokens)

    def room_to_encode(self, num_tokens: int) -> bool:
        """Whether one more picture may be encoded; one above the whole budget may, alone."""
        return num_tokens <= self.encoder_left or not self.batch.encode

    def encode(self, seq: Sequence, index: int) -> None:
        self.batch.encode.append(ScheduledMedia(seq, index))
        self.encoder_left -= seq.spans[index].length
