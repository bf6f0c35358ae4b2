"""What one step of the engine computes, as plain data: the scheduler writes it, the runner reads it.

Knows which tokens of which sequence are computed and which pictures are encoded before them. Does not know tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qvl.engine.sequence import Sequence
from qvl.prompt import Span
from qvl.types import TokenLogprob


@dataclass(slots=True)  # not frozen: hundreds are made in every step, and frozen ones take three times as long
class ScheduledSeq:
    """Tokens [start, start + num_tokens) of `seq` are computed; its block table already holds the blocks for them.

    `samples`: these tokens reach the end of the sequence, so the logits of the last one choose the next token.
    """

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class ScheduledMedia:
    """Picture or video number `index` of `seq` is encoded before this step's forward pass."""

    seq: Sequence
    index: int

    @property
    def span(self) -> Span:
        return self.seq.spans[self.index]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The keys and values of block `source` are copied to block `target`, before anything of the step is written."""

    source: int
    target: int


@dataclass(slots=True)
class ScheduledBatch:
    """One step. The first `num_decodes` entries of `seqs` are decodes: one token each, all of them sample.

    `encode` holds each digest once; every picture whose tokens meet an entry's range is either in it or already in the
    encoder cache.
    """

    seqs: list[ScheduledSeq] = field(default_factory=list)
    encode: list[ScheduledMedia] = field(default_factory=list)
    num_decodes: int = 0
    copies: list[BlockCopy] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.seqs)

    @property
    def sampling(self) -> list[ScheduledSeq]:
        """The entries that sample a token, in the order of `StepResult.token_ids`."""
        return [entry for entry in self.seqs if entry.samples]

    def __bool__(self) -> bool:
        return bool(self.seqs)


@dataclass(slots=True)
class StepResult:
    """What the runner found: `token_ids` has one entry per `batch.sampling`, in order.

    `logprobs` is empty when nobody asked, else as long as `token_ids`. `errors` maps the request id of a sequence
    that failed (not-a-number logits, a picture that could not be encoded) to a message for its caller; what the lists
    hold for such a sequence is ignored.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob | None] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
