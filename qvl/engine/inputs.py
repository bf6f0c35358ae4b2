"""The plain data of a step becomes tensors: token ids, positions, attention metadata, and where pictures go.

Knows the layout that `AttentionMetadata` asks for and that one copy to the device is cheaper than seven. Does not know
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
from qvl.engine.rows import SequenceRows
from qvl.engine.transfer import upload
from qvl.layers.attention import AttentionMetadata

UNKNOWN = -1  # in place of a token id that only the device knows yet
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class MediaRows:
    """Rows [row, row + count) of the step are tokens [start, start + count) of the picture `digest`."""

    digest: bytes
    row: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class StepNumbers:
    """One step on the host: n tokens of b sequences, m of which sample; the first `num_decodes` have one token each."""

    token_ids: Numbers  # [n], UNKNOWN where the id of a decode is on the device only
    positions: Numbers  # [3, n]
    slots: Numbers  # [n]
    rows: Numbers  # [b]
    last_tokens: Numbers  # [m], which of the n tokens have logits that choose a token
    sampling_rows: Numbers  # [m], rows of those sequences
    query_lens: list[int]
    context_lens: list[int]  # these tokens included
    num_decodes: int
    media: list[MediaRows]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The same on the device, where every id is known."""

    token_ids: Tensor  # int64 [n]
    positions: Tensor  # int64 [3, n]
    metadata: AttentionMetadata
    last_tokens: Tensor  # int64 [m]
    sampling_rows: Tensor  # int64 [m]


@dataclass(frozen=True, slots=True)
class DecodeNumbers:
    """What one decode of a step is: arrays of b numbers each."""

    token_ids: Numbers  # UNKNOWN where the id is on the device only
    positions: Numbers
    slots: Numbers
    rows: Numbers
    seq_lens: Numbers


def decode_numbers(
    entries: Sequence[ScheduledSeq], rows: Numbers, tables: SequenceRows, block_size: int
) -> DecodeNumbers:
    """Of entries with one generated token each."""
    starts = np.array([entry.start for entry in entries], dtype=np.int64)
    return DecodeNumbers(
        token_ids=np.array([decode_id(entry) for entry in entries], dtype=np.int64),
        positions=starts + tables.rope_deltas[rows],
        slots=slots(rows, starts, tables, block_size),
        rows=rows,
        seq_lens=starts + 1,
    )


def step_numbers(
    entries: Sequence[ScheduledSeq], num_decodes: int, block_size: int, tables: SequenceRows
) -> StepNumbers:
    """Of `entries`, whose blocks the tables hold afterwards."""
    query_lens = [entry.num_tokens for entry in entries]
    bounds = [0, *itertools.accumulate(query_lens)]
    rows = tables.place(entries)
    samples = [i for i, entry in enumerate(entries) if entry.samples]
    starts = np.array([entry.start for entry in entries], dtype=np.int64)
    index = np.repeat(starts - bounds[:-1], query_lens) + np.arange(bounds[-1])
    return StepNumbers(
        token_ids=np.fromiter(itertools.chain.from_iterable(map(token_ids, entries)), np.int64, bounds[-1]),
        positions=position_axes(entries, num_decodes),
        slots=slots(np.repeat(rows, query_lens), index, tables, block_size),
        rows=rows,
        last_tokens=np.asarray([bounds[i + 1] - 1 for i in samples], dtype=np.int64),
        sampling_rows=rows[samples],
        query_lens=query_lens,
        context_lens=[entry.end for entry in entries],
        num_decodes=num_decodes,
        media=media_rows(entries, bounds),
    )


def build_inputs(numbers: StepNumbers, block_size: int, tables: SequenceRows) -> StepInputs:
    """One copy to the device, and what it alone knows."""
    num_decodes = numbers.num_decodes
    ids, positions, slot_mapping, last, all_rows, sampling_rows, seq_lens = upload(
        [
            numbers.token_ids,
            numbers.positions,
            numbers.slots,
            numbers.last_tokens,
            numbers.rows,
            numbers.sampling_rows,
            np.asarray(numbers.context_lens, np.int32),
        ],
        tables.device,
    )
    if UNKNOWN in numbers.token_ids[:num_decodes]:
        ids[:num_decodes] = known_ids(ids[:num_decodes], all_rows[:num_decodes], tables)
    metadata = AttentionMetadata(
        seq_lens=seq_lens,
        block_table=tables.block_tables.index_select(0, all_rows),
        slot_mapping=slot_mapping,
        query_lens=numbers.query_lens,
        context_lens=numbers.context_lens,
        block_size=block_size,
        num_decodes=num_decodes,
    )
    return StepInputs(ids, positions, metadata, last, sampling_rows)


def known_ids(ids: Tensor, rows: Tensor, tables: SequenceRows) -> Tensor:
    """`ids` int64 [b] with the last sampled token of its row in place of each UNKNOWN."""
    return torch.where(ids < 0, tables.last_tokens.index_select(0, rows), ids)


def decode_id(entry: ScheduledSeq) -> int:
    """The id of the one token that `entry` computes, UNKNOWN while it is on the device only."""
    known = entry.seq.token_ids
    return known[entry.start] if entry.start < len(known) else UNKNOWN


def token_ids(entry: ScheduledSeq) -> list[int]:
    """The ids of the tokens that `entry` computes; only the one of a decode may be unknown."""
    return entry.seq.token_ids[entry.start : entry.end] or [UNKNOWN]


def position_axes(entries: Sequence[ScheduledSeq], num_decodes: int) -> Numbers:
    """M-RoPE positions int64 [3, n]; those of decodes, generated tokens all, are one number each."""
    decoded = np.asarray([entry.start + entry.seq.rope_delta for entry in entries[:num_decodes]], dtype=np.int64)
    prefilled = [entry.seq.positions(entry.start, entry.num_tokens) for entry in entries[num_decodes:]]
    return np.concatenate([np.broadcast_to(decoded, (3, num_decodes)), *prefilled], axis=1)


def slots(rows: Numbers, index: Numbers, tables: SequenceRows, block_size: int) -> Numbers:
    """Where the keys and values of token `index[i]` of row `rows[i]` go: block * block_size + offset, int64 [n]."""
    found: Numbers = tables.host_tables[rows, index // block_size].astype(np.int64) * block_size + index % block_size
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
