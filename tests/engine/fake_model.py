"""A model that is only arithmetic, run through real blocks: what it says depends on every token and picture before.

The fake KV cache stores, per slot, a hash chained over the slot of the token before. A block shared by mistake,
computed twice, or read before it was written therefore changes the answer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qvl.engine.batch import ScheduledBatch, ScheduledSeq, StepResult
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.engine.sequence import SamplingState
from qvl.specs import GenerationDefaults, ModelSpec, ProcessorSpec, SpecialIds, TextSpec, VisionSpec
from qvl.types import SamplingParams

VOCAB = 40
EOS = (38, 39)
PAD = 37


@dataclass(frozen=True)
class Limits:
    """A `SchedulerConfig` with roomy defaults."""

    max_model_len: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    max_num_mixed_tokens: int = 32
    encoder_budget_tokens: int = 32
    embedding_bytes_per_token: int = 1


def tiny_spec(max_positions: int = 64) -> ModelSpec:
    text = TextSpec(
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=16,
        vocab_size=VOCAB,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        mrope_section=(2, 1, 1),
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
    )
    vision = VisionSpec(1, 8, 2, 2.0, 3, 14, 2, 2, 8)
    ids = SpecialIds(EOS, 39, 30, 38, 33, 34, PAD, 36, 35)
    processor = ProcessorSpec()
    return ModelSpec(
        "tiny", Path("tiny"), "qwen2_vl", "X", text, vision, ids, processor, GenerationDefaults(), "float32"
    )


def picture(offset: int, length: int, digest: bytes) -> MediaInput:
    """A picture of `length` tokens in one row."""
    return MediaInput("image", offset, length, 1, 2, 2 * length, digest, 28, 28 * length)


def request(
    request_id: str,
    parts: list[int | tuple[int, bytes]],
    sampling: SamplingParams | None = None,
    salt: bytes = b"",
) -> AddRequest:
    """`parts`: token ids, and pictures as (length, digest)."""
    ids: list[int] = []
    media: list[MediaInput] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            media.append(picture(len(ids), *part))
            ids += [PAD] * part[0]
    return AddRequest(request_id, ids, media, sampling or SamplingParams(max_tokens=4), salt)


def _link(previous: bytes, token: str) -> bytes:
    return hashlib.blake2b(previous + token.encode(), digest_size=8).digest()


def _choose(state: bytes, sampling: SamplingState, num_output: int) -> int:
    token = int.from_bytes(state, "big") % VOCAB
    while token in sampling.banned(num_output):
        token = (token + 1) % VOCAB
    return token


def expected(asked: AddRequest, limits: Limits) -> list[int]:
    """The answer to one request alone, computed without any scheduler."""
    pads = {m.offset + i: f"{m.digest.hex()}:{i}" for m in asked.media for i in range(m.length)}
    state = b""
    for index, token in enumerate(asked.token_ids):
        state = _link(state, pads.get(index, str(token)))
    sampling = SamplingState.create(asked.sampling, EOS, 0)
    output: list[int] = []
    while True:
        token = _choose(state, sampling, len(output))
        output.append(token)
        full = len(asked.token_ids) + len(output) >= limits.max_model_len
        if token in sampling.stop_ids or len(output) == asked.sampling.max_tokens or full:
            return output
        state = _link(state, str(token))


class FakeRunner:
    """Runs batches; checks that what it is given can be computed."""

    def __init__(self, num_blocks: int, block_size: int, encoder_cache: EncoderCache[object]) -> None:
        self.block_size = block_size
        self.slots: list[bytes | None] = [None] * (num_blocks * block_size)
        self.encoder_cache = encoder_cache
        self.encoded: list[bytes] = []
        self.sampled: dict[tuple[str, int], int] = {}
        self.num_computed = 0

    def run(self, batch: ScheduledBatch) -> StepResult:
        for copy in batch.copies:
            self.slots[self._block(copy.target)] = self.slots[self._block(copy.source)]
        for media in batch.encode:
            assert not self.encoder_cache.is_filled(media.span.digest)
            self.encoder_cache.put(media.span.digest, media.span.digest.hex())
            self.encoded.append(media.span.digest)
        states = [self._compute(entry) for entry in batch.seqs]
        chosen: list[int] = []
        for entry, state in zip(batch.seqs, states, strict=True):
            if entry.samples:
                chosen.append(_choose(state, entry.seq.sampling, entry.end - entry.seq.num_prompt_tokens))
                self.sampled[entry.seq.request_id, entry.end] = chosen[-1]
        return StepResult(chosen)

    def _compute(self, entry: ScheduledSeq) -> bytes:
        assert entry.num_tokens >= 1
        seq = entry.seq
        state = self._read(seq.block_table, entry.start - 1) if entry.start else b""
        for index in range(entry.start, entry.end):
            touched = [span for span in seq.spans if span.offset <= index < span.end]
            # A token of the step before may not be known to the host yet: a device would still have it.
            known = seq.token_ids[index] if index < seq.num_tokens else self.sampled[seq.request_id, index]
            token = str(known)
            if touched:
                token = f"{self.encoder_cache.get(touched[0].digest)}:{index - touched[0].offset}"
            state = _link(state, token)
            self.slots[self._slot(seq.block_table, index)] = state
            self.num_computed += 1
        return state

    def _read(self, table: list[int], index: int) -> bytes:
        state = self.slots[self._slot(table, index)]
        assert state is not None, "a slot is read before it was written"
        return state

    def _block(self, block: int) -> slice:
        return slice(block * self.block_size, (block + 1) * self.block_size)

    def _slot(self, table: list[int], index: int) -> int:
        return table[index // self.block_size] * self.block_size + index % self.block_size
