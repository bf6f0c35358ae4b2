"""A step's tensors against a loop over tokens; what a failed picture takes with it; the arithmetic of GPU memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from qvl.engine.batch import ScheduledBatch, ScheduledSeq
from qvl.engine.device import is_out_of_memory, read_facts
from qvl.engine.inputs import build_inputs, decode_numbers, step_numbers
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.engine.rows import SequenceRows
from qvl.engine.runner import Flight, healthy_part, result_of
from qvl.engine.sequence import Sequence, Status
from qvl.errors import ConfigError
from qvl.types import TokenLogprob
from tests.engine.harness import greedy, make_engine, pixels, read_spec

BLOCK = 4
CPU = torch.device("cpu")


def sequence(
    checkpoint: Path, name: str, num_tokens: int, *pictures: tuple[int, int, int], first_block: int
) -> Sequence:
    """`pictures` are (offset, rows, columns) in tokens; blocks count down from `first_block`."""
    media = [
        MediaInput("image", offset, rows * columns, 1, 2 * rows, 2 * columns, f"{name}{offset}".encode(), 28, 28)
        for offset, rows, columns in pictures
    ]
    arrays = [pixels(offset, rows, columns) for offset, rows, columns in pictures]
    request = AddRequest(name, list(range(100, 100 + num_tokens)), media, greedy())
    seq = Sequence.create(request, read_spec(checkpoint), block_size=BLOCK, pixels=arrays)
    seq.block_table = [first_block - i for i in range(-(-num_tokens // BLOCK) + 2)]
    seq.status = Status.RUNNING
    return seq


def test_tensors_of_a_mixed_step(checkpoint: Path) -> None:
    """The last token of a decode may be known to the device only."""
    rng = random.Random(0)
    tables = SequenceRows(6, 30, CPU)
    for _ in range(50):
        decodes = [
            sequence(checkpoint, f"d{i}", rng.randint(1, 30), first_block=40 + 20 * i) for i in range(rng.randint(0, 3))
        ]
        entries, truth = [], []
        for seq in decodes:
            for _ in range(rng.randint(1, 5)):
                seq.append(rng.randint(0, 500))
            entries.append(ScheduledSeq(seq, seq.num_tokens - 1, 1, True))
            truth.append(list(seq.token_ids))
        for i in range(rng.randint(0 if decodes else 1, 3)):
            seq = sequence(checkpoint, f"p{i}", 40, (3, 2, 3), (9, 1, 4), (20, 4, 4), first_block=300 + 20 * i)
            start = rng.randint(0, 38)
            num_tokens = rng.randint(1, 40 - start)
            entries.append(ScheduledSeq(seq, start, num_tokens, start + num_tokens == 40))
            truth.append(seq.token_ids)
        for entry, row in zip(entries, tables.place(entries), strict=True):
            if entry.seq in decodes and rng.random() < 0.5:
                tables.remember(torch.tensor([row]), torch.tensor([entry.seq.token_ids.pop()]))
        check_inputs(entries, truth, len(decodes), tables)
        if len(entries) == len(decodes):
            check_decodes(entries, truth, tables)
        for entry in entries:
            entry.seq.status = Status.FINISHED


def check_inputs(entries: list[ScheduledSeq], truth: list[list[int]], num_decodes: int, tables: SequenceRows) -> None:
    """`truth` holds the tokens of every entry's sequence."""
    numbers = step_numbers(entries, num_decodes, BLOCK, tables)
    inputs = build_inputs(numbers, BLOCK, tables)
    metadata = inputs.metadata
    ids, positions, slots, last, pictures = [], [], [], [], {}
    for entry, known in zip(entries, truth, strict=True):
        for i in range(entry.start, entry.end):
            seq = entry.seq
            for span in seq.spans:
                if span.offset <= i < span.end:
                    pictures[len(ids)] = (span.digest, i - span.offset)
            ids.append(known[i])
            positions.append(seq.positions(i, 1)[:, 0].tolist())
            slots.append(seq.block_table[i // BLOCK] * BLOCK + i % BLOCK)
        if entry.samples:
            last.append(len(ids) - 1)
    assert inputs.token_ids.tolist() == ids
    assert inputs.positions.T.tolist() == positions
    assert metadata.slot_mapping.tolist() == slots
    assert inputs.last_tokens.tolist() == last
    sampling = [row for row, entry in zip(tables.place(entries).tolist(), entries, strict=True) if entry.samples]
    assert inputs.sampling_rows.tolist() == numbers.sampling_rows.tolist() == sampling
    found = {rows.row + i: (rows.digest, rows.start + i) for rows in numbers.media for i in range(rows.count)}
    assert found == pictures
    assert metadata.query_lens == [entry.num_tokens for entry in entries]
    assert metadata.seq_lens.tolist() == metadata.context_lens == [entry.end for entry in entries]
    assert (metadata.seq_lens.dtype, metadata.block_table.dtype) == (torch.int32, torch.int32)
    assert metadata.num_decodes == num_decodes
    for entry, table in zip(entries, metadata.block_table.tolist(), strict=True):
        used = -(-entry.end // BLOCK)
        assert table[:used] == entry.seq.block_table[:used]


def check_decodes(entries: list[ScheduledSeq], truth: list[list[int]], tables: SequenceRows) -> None:
    rows = tables.place(entries)
    numbers = decode_numbers(entries, rows, tables, BLOCK)
    last = tables.last_tokens[torch.from_numpy(rows)].tolist()
    ids = [known if known >= 0 else kept for known, kept in zip(numbers.token_ids.tolist(), last, strict=True)]
    assert ids == [tokens[entry.start] for entry, tokens in zip(entries, truth, strict=True)]
    assert numbers.positions.tolist() == [entry.seq.positions(entry.start, 1)[0, 0] for entry in entries]
    assert numbers.slots.tolist() == [
        entry.seq.block_table[entry.start // BLOCK] * BLOCK + entry.start % BLOCK for entry in entries
    ]
    assert numbers.seq_lens.tolist() == [entry.end for entry in entries]


def test_block_tables_follow_growth_preemption_and_rows_that_change_hands(checkpoint: Path) -> None:
    """Four rows for more than forty sequences; the tables on the device equal the lists of blocks at every step."""
    tables = SequenceRows(4, 60, CPU)
    rng = random.Random(1)
    running: list[Sequence] = []
    for step in range(200):
        if len(running) < 4 and rng.random() < 0.5:
            running.append(sequence(checkpoint, f"s{step}", rng.randint(5, 30), first_block=rng.randint(100, 900)))
        for seq in running:
            seq.append(1)
            if seq.num_tokens > BLOCK * len(seq.block_table):
                seq.block_table.append(rng.randrange(999))
            if rng.random() < 0.05:  # preempted: recomputed in other blocks
                blocks = len(seq.block_table)
                seq.reset()
                seq.block_table = [rng.randrange(999) for _ in range(blocks)]
                seq.status = Status.RUNNING
        entries = [ScheduledSeq(seq, seq.num_tokens - 1, 1, True) for seq in running if rng.random() < 0.8]
        rows = tables.place(entries).tolist()
        assert len(set(rows)) == len(rows)
        for entry, row in zip(entries, rows, strict=True):
            blocks = entry.seq.block_table
            assert tables.block_tables[row, : len(blocks)].tolist() == blocks
            assert tables.host_tables[row, : len(blocks)].tolist() == blocks
        if running and rng.random() < 0.2:
            running.pop(rng.randrange(len(running))).status = Status.FINISHED


def test_a_failed_picture_takes_along_who_needs_it_now(checkpoint: Path) -> None:
    decode = sequence(checkpoint, "decode", 12, (2, 2, 2), first_block=10)
    decode.append(5)
    early = sequence(checkpoint, "early", 30, (10, 2, 2), (20, 2, 2), first_block=30)
    late = sequence(checkpoint, "late", 30, (10, 2, 2), (20, 2, 2), first_block=60)
    entries = [ScheduledSeq(decode, 12, 1, True), ScheduledSeq(early, 0, 15, False), ScheduledSeq(late, 16, 14, True)]
    batch = ScheduledBatch(entries, [], 1)
    assert healthy_part(batch, {}).entries == entries
    step = healthy_part(batch, {decode.spans[0].digest: "a", early.spans[1].digest: "b", late.spans[1].digest: "c"})
    assert (step.entries, step.num_decodes, step.errors) == (entries[:2], 1, {"late": "c"})
    step = healthy_part(batch, {early.spans[0].digest: "gone"})
    assert (step.entries, step.errors) == ([entries[0], entries[2]], {"early": "gone"})


def test_results_stand_in_the_order_of_the_batch(checkpoint: Path) -> None:
    entries = [
        ScheduledSeq(sequence(checkpoint, name, 8, first_block=9), 0, 8, samples)
        for name, samples in (("a", True), ("b", False), ("c", True), ("d", True))
    ]
    logprob = TokenLogprob(7, -0.5)
    flight = Flight(ScheduledBatch(entries), [entries[0], entries[3]], 0, {"c": "failed"}, [entries[0], entries[3]])
    result = result_of(flight, [3, 7], {1: logprob})
    assert (result.token_ids[0], result.token_ids[2], len(result.token_ids)) == (3, 7, 3)
    assert result.logprobs == [None, None, logprob]
    assert result.errors == {"c": "failed"}
    assert result_of(flight, [3, 7], {}).logprobs == []
    whole = Flight(ScheduledBatch(entries), entries, 0, {}, [entries[0], entries[2], entries[3]])
    assert result_of(whole, [3, 5, 7], {}).token_ids == [3, 5, 7]


def test_facts_of_this_machine() -> None:
    facts = read_facts("cpu")
    assert (facts.kind, facts.capability) == ("cpu", (0, 0))
    assert facts.num_cores >= 1
    assert facts.total_memory > 1 << 26
    assert facts.preferred_cpu_dtype in ("float32", "bfloat16")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA GPU"):
            read_facts("cuda")


def test_a_failed_allocation_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("backend", "named"), [("auto", "attention: "), ("sdpa", "attention: gather+sdpa")])
def test_a_start_tells_what_runs_and_why(
    backend: str, named: str, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="qvl.engine"):
        model = make_engine(checkpoint, attention_backend=backend).runner.model
    told = [record.getMessage() for record in caplog.records]
    assert any(line.startswith(named) and line.endswith(model.attention_reason) for line in told)
    assert f"attention in pictures: {model.vision_reason}" in told
    assert f"matrices: {model.linear_reason}" in told
