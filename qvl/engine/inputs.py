"""The plain data of a step becomes tensors: token ids, positions, attention metadata, and where pictures go.

Knows the layout that `AttentionMetadata` asks for and that one copy to the device is cheaper than eight. Does not know
weights, the KV cache itself, or why these tokens were chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.batch import ScheduledSeq
from qvl.engine.sequence import Sequence as SequenceState
from qvl.layers.attention import AttentionMetadata


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Rows [row, row + count) of the step are tokens [start, start + count) of the picture `digest`."""

    digest: bytes
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the device: n tokens of b sequences, m of which sample."""

    token_ids: Tensor  # int64 [n]
    positions: Tensor  # int64 [3, n]
    metadata: AttentionMetadata
    last_rows: Tensor  # int64 [m], rows whose logits choose a token
    media: list[MediaRows]


class BlockTables:
    """Block tables as arrays, kept from step to step: a decode adds one number to a table of hundreds, once a block."""

    def __init__(self) -> None:
        self._kept: dict[str, _Table] = {}

    def of(self, entries: Sequence[ScheduledSeq], block_size: int) -> npt.NDArray[np.int32]:
        """Blocks of every sequence up to its last token, padded with block 0: int32 [b, most]."""
        counts = [-(-entry.end // block_size) for entry in entries]
        tables = np.zeros((len(entries), max(counts)), dtype=np.int32)
        before, self._kept = self._kept, {}
        for line, entry, count in zip(tables, entries, counts, strict=True):
            seq = entry.seq
            table = before.get(seq.request_id)
            # A preempted sequence comes back with other blocks, another request may bear the name of one that ended.
            if table is None or table.seq is not seq or table.num_preemptions != seq.num_preemptions:
                table = _Table(seq, seq.num_preemptions, np.zeros(0, dtype=np.int32))
            known = len(table.blocks)
            if known < count:
                table.blocks = np.append(table.blocks, np.asarray(seq.block_table[known:], dtype=np.int32))
            line[:count] = table.blocks[:count]
            self._kept[seq.request_id] = table
        return tables


@dataclass(slots=True)
class _Table:
    seq: SequenceState
    num_preemptions: int
    blocks: npt.NDArray[np.int32]


def build_inputs(
    entries: Sequence[ScheduledSeq], num_decodes: int, block_size: int, device: torch.device, known: BlockTables
) -> StepInputs:
    """Tensors for `entries`, of which the first `num_decodes` have one token each."""
    query_lens = [entry.num_tokens for entry in entries]
    context_lens = [entry.end for entry in entries]
    bounds = [0, *itertools.accumulate(query_lens)]
    tables = known.of(entries, block_size)
    longs = (
        np.fromiter(itertools.chain.from_iterable(token_ids(entry) for entry in entries), np.int64, bounds[-1]),
        position_axes(entries, num_decodes),
        slots(entries, tables, block_size),
        np.asarray([bounds[i + 1] - 1 for i, entry in enumerate(entries) if entry.samples], dtype=np.int64),
    )
    ids, positions, slot_mapping, last_rows = to_device(longs, device)
    ints = (np.asarray(bounds, np.int32), np.asarray(context_lens, np.int32), tables)
    cu_seqlens, seq_lens, block_table = to_device(ints, device)
    metadata = AttentionMetadata(
        cu_seqlens_q=cu_seqlens,
        seq_lens=seq_lens,
        block_table=block_table,
        slot_mapping=slot_mapping,
        query_lens=query_lens,
        context_lens=context_lens,
        block_size=block_size,
        num_decodes=num_decodes,
    )
    return StepInputs(ids, positions, metadata, last_rows, media_rows(entries, bounds))


def token_ids(entry: ScheduledSeq) -> list[int]:
    """The ids of the tokens that `entry` computes."""
    return entry.seq.token_ids[entry.start : entry.end]


def position_axes(entries: Sequence[ScheduledSeq], num_decodes: int) -> npt.NDArray[np.int64]:
    """M-RoPE positions int64 [3, n]; those of decodes, generated tokens all, are one number each."""
    decoded = np.asarray([entry.start + entry.seq.rope_delta for entry in entries[:num_decodes]], dtype=np.int64)
    prefilled = [entry.seq.positions(entry.start, entry.num_tokens) for entry in entries[num_decodes:]]
    return np.concatenate([np.broadcast_to(decoded, (3, num_decodes)), *prefilled], axis=1)


def slots(entries: Sequence[ScheduledSeq], tables: npt.NDArray[np.int32], block_size: int) -> npt.NDArray[np.int64]:
    """Where each token's keys and values go: block * block_size + offset, int64 [n]."""
    lengths = [entry.num_tokens for entry in entries]
    rows = np.repeat(np.arange(len(entries)), lengths)
    index = np.concatenate([np.arange(entry.start, entry.end) for entry in entries])
    found: npt.NDArray[np.int64] = tables[rows, index // block_size].astype(np.int64) * block_size + index % block_size
    return found


def media_rows(entries: Sequence[ScheduledSeq], bounds: Sequence[int]) -> list[MediaRows]:
    """Which rows of the step are picture tokens, and of which picture."""
    found = []
    for entry, row in zip(entries, bounds, strict=False):
        if entry.start >= entry.seq.num_prompt_tokens:
            continue  # generated tokens are never pictures
        for i in entry.seq.spans_in(entry.start, entry.num_tokens):
            span = entry.seq.spans[i]
            first, last = max(span.offset, entry.start), min(span.end, entry.end)
            found.append(MediaRows(span.digest, row + first - entry.start, first - span.offset, last - first))
    return found


def to_device(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype, end to end in one buffer, copied in one go; views of it, in order and shape."""
    buffer = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == "cuda":
        buffer = buffer.pin_memory().to(device, non_blocking=True)
    parts = torch.split(buffer, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
