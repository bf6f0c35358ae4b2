"""Steps over static memory, recorded and replayed: real rows as if computed alone, padded ones without a trace.

What a GPU does with CUDA graphs is done here by tracing the same work into a list of tensor operations: whatever Python
decided while it was recorded is frozen, and only what lies in static memory can differ in a replay.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from qvl.engine.engine import Engine
from qvl.engine.graphs import DecodeSteps, Recorder, bucket_sizes
from qvl.engine.inputs import UNKNOWN, DecodeNumbers
from qvl.kernels import fused
from qvl.kernels.fused import rotate
from qvl.kernels.sdpa import GatherAttention
from qvl.layers import linear as layers
from qvl.layers.attention import AttentionMetadata
from tests.engine.harness import Ask, greedy, make_engine, pixels, run, words

BLOCK = 16


class Operations(TorchDispatchMode):
    """Tensor operations as they come. What would make the host wait for a number cannot be recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any], Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, form = tree_flatten((args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        made = tree_flatten(out)[0]
        masked = any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in given)
        by_place = func is torch.ops.aten.index.Tensor and not masked
        unknown_size = torch.Tag.dynamic_output_shape in func.tags and not by_place
        if unknown_size or not all(isinstance(one, torch.Tensor | None) for one in made):
            raise RuntimeError(f"{func} tells the host what tensors hold")
        self.calls.append((func, given, form, made))
        return out

    def again(self, last: torch.Tensor) -> torch.Tensor:
        """All of them, and what now stands where `last` stood."""
        now: dict[int, Any] = {}  # by the tensor that was recorded, which `calls` keeps
        for func, given, form, made in self.calls:
            args, kwargs = tree_unflatten([now.get(id(one), one) for one in given], form)
            outs = tree_flatten(func(*args, **kwargs))[0]
            now.update({id(old): new for old, new in zip(made, outs, strict=True) if isinstance(old, torch.Tensor)})
        found = now[id(last)]
        assert isinstance(found, torch.Tensor)
        return found


class Tracer:
    """A recorder whose replays execute recorded operations and nothing of the Python code that was recorded.

    What one replay left is gone with the next one, as in memory that they share.
    """

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.recorded = 0
        self.replayed = 0
        self.left = torch.zeros(0)

    def record(self, work: Callable[[], torch.Tensor], *, ran: bool = False) -> Callable[[], torch.Tensor]:
        if self.recorded == self.most:
            raise RuntimeError("out of memory for one more graph\nwith details")
        if not ran:
            work()
        with Operations() as operations:
            last = work()
        self.recorded += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            self.left.fill_(torch.nan)
            self.left = operations.again(last)
            return self.left

        return replay


class StaticAttention(GatherAttention):
    """What may be recorded by tensor operations whose shapes do not follow the lengths; the rest as everywhere."""

    graph_safe = True
    takes_sums = False
    tile_tokens = 3

    def plan(self, metadata: AttentionMetadata) -> Any:
        static = metadata.prompt_tiles is not None or metadata.num_decodes == len(metadata.query_lens)
        return metadata if static else super().plan(metadata)

    def run(self, qkv: torch.Tensor, angles: Any, kv: Any, plan: Any) -> torch.Tensor:
        if not isinstance(plan, AttentionMetadata):
            return super().run(qkv, angles, kv, plan)
        _, size, kv_heads, dim = kv[0].shape
        heads = qkv.unflatten(1, (-1, dim))
        q, k = rotate(heads[:, : -2 * kv_heads], *angles), rotate(heads[:, -2 * kv_heads : -kv_heads], *angles)
        for cache, new in zip(kv, (k, heads[:, -kv_heads:]), strict=True):
            write_rows(cache.view(-1, kv_heads, dim), plan.slot_mapping, new)
        out = torch.full((len(q), q.shape[1] * dim), torch.nan)  # as memory may hold it
        count = plan.num_decodes
        if count:
            out[:count] = attend(q[:count], kv, plan.block_table, plan.seq_lens, size)
        if plan.prompt_tiles is not None:
            self.attend_tiles(q, kv, plan.block_table, plan.prompt_tiles, out, size)
        return out

    def attend_tiles(
        self, q: torch.Tensor, kv: Any, table: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor, size: int
    ) -> None:
        """The tokens of all tiles, each with its own context; those that no tile has write nowhere."""
        at = torch.arange(self.tile_tokens)
        seq, first, count, before = (field[:, None] for field in tiles.long().unbind(1))
        live = (at < count).flatten()
        rows = torch.where(live, (first + at).flatten(), -1)
        lengths = torch.where(live, (before + at + 1).flatten(), 0)
        found = attend(q[rows.clamp(min=0)], kv, table[(seq + 0 * at).flatten()], lengths, size)
        write_rows(out, rows, found)


def write_rows(out: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """Each to its row; those of -1 nowhere."""
    wider = torch.cat((out, out[:1])).index_copy_(0, torch.where(rows < 0, len(out), rows), values)
    out.copy_(wider[:-1])


def attend(q: torch.Tensor, kv: Any, table: torch.Tensor, lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Every row of q against all its block table could hold, less what lies beyond its length."""
    places = (table.long()[:, :, None] * size + torch.arange(size)).flatten(1)  # [b, most]
    live = (torch.arange(places.shape[1]) < lengths[:, None])[:, None]  # [b, 1, most]
    k, v = (cache.flatten(0, 1)[places].transpose(1, 2) for cache in kv)  # [b, kv_heads, most, dim]
    v = torch.where(live[..., None], v, 0.0)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [b, kv_heads, group, dim]
    scores = torch.where(live[:, :, None], grouped @ k.transpose(2, 3) * q.shape[-1] ** -0.5, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).flatten(1)


@pytest.fixture(autouse=True)
def torch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracer sees tensor operations, not what compiled code does with pointers."""
    monkeypatch.setattr(fused, "kernels_for", lambda _: None)
    monkeypatch.setattr(layers, "linear", F.linear)


def engine_over(folder: Path, recorder: Recorder | None, **options: Any) -> Engine:
    engine = make_engine(folder, **{"max_model_len": 128, "num_blocks": 64, "max_num_batched_tokens": 24, **options})
    engine.runner.model.attention = StaticAttention()
    engine.runner.prepare_static(recorder)
    return engine


def steps_of(engine: Engine) -> DecodeSteps:
    assert engine.runner.decodes is not None
    return engine.runner.decodes


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"min_tokens": 5}]
    asks = [Ask([words(i, 5 + 3 * i)], greedy(6 + 2 * i, **kinds[i % 5])) for i in range(9)]  # type: ignore[arg-type]
    return [*asks, Ask([words(20, 4), pixels(1, 2, 3), words(21, 5)], greedy(12))]


def test_replays_give_the_answers_of_plain_steps(checkpoint: Path, asks: list[Ask]) -> None:
    want = run(make_engine(checkpoint, max_model_len=128), asks)
    tracer = Tracer()
    engine = engine_over(checkpoint, tracer, max_num_seqs=5, async_scheduling=True)
    assert list(steps_of(engine).replays) == [5, 4, 2, 1]
    assert engine.runner.prompts is not None
    assert tracer.recorded == 4 + len(engine.runner.prompts.shapes) == 4 + 2
    got = run(engine, asks, stagger=2)
    assert [outcome.token_ids for outcome in got] == [outcome.token_ids for outcome in want]
    assert [[entry.token_id for entry in one.logprobs] for one in got] == [
        [entry.token_id for entry in one.logprobs] for one in want
    ]
    assert tracer.replayed > 10
    eager = engine_over(checkpoint, None, max_num_seqs=5, async_scheduling=True)
    assert [outcome.token_ids for outcome in run(eager, asks)] == [outcome.token_ids for outcome in want]


def decodes(count: int, rng: np.random.Generator) -> DecodeNumbers:
    """`count` decodes of 20 to 29 tokens in blocks of their own, the first one's id on the device only."""
    lengths = rng.integers(20, 30, count)
    ids = rng.integers(0, 500, count)
    ids[0] = UNKNOWN
    slots = (2 * np.arange(count) + 1) * BLOCK + (lengths - 1) % BLOCK
    return DecodeNumbers(ids, lengths - 1 + 5, slots, np.arange(count), lengths)


@torch.inference_mode()
def test_padding_changes_no_real_row_and_leaves_no_trace(checkpoint: Path) -> None:
    """For 1 to 5 rows in buckets of 1, 2, 4 and 5: each row alone gives the same numbers, and every slot of the
    cache that no row owns, every other last token stays as it was.
    """
    tracer = Tracer()
    engine = engine_over(checkpoint, tracer, max_num_seqs=5)
    steps, tables = steps_of(engine), engine.runner.tables
    tables.block_tables[:5, :2] = torch.arange(10, dtype=torch.int32).view(5, 2)
    generator = torch.Generator().manual_seed(0)
    for cache in engine.runner.kv_cache:
        for half in cache:
            half.normal_(generator=generator)
    for count in range(1, 6):
        tables.last_tokens.random_(0, 500, generator=generator)
        before = [(k.clone(), v.clone()) for k, v in engine.runner.kv_cache]
        last = tables.last_tokens.clone()
        numbers = decodes(count, np.random.default_rng(count))
        found = steps.run(numbers)
        logits, best = found.logits.clone(), found.best.clone()
        written = torch.zeros(engine.config.num_blocks * BLOCK, dtype=torch.bool)
        written[torch.from_numpy(numbers.slots)] = True
        for (k, v), (old_k, old_v) in zip(engine.runner.kv_cache, before, strict=True):
            for new, old in ((k, old_k), (v, old_v)):
                same = (new == old).flatten(2).all(2).flatten()
                assert torch.equal(~same, written)
        assert torch.equal(tables.last_tokens[:count], best)
        assert torch.equal(tables.last_tokens[count:-1], last[count:-1])
        for row in range(count):
            tables.last_tokens.copy_(last)
            alone = steps.run(DecodeNumbers(*(values[row : row + 1] for values in dataclasses.astuple(numbers))))
            torch.testing.assert_close(alone.logits[0], logits[row], rtol=1e-4, atol=1e-4)
            assert alone.best.item() == best[row].item()
    assert tracer.replayed == 5 + 15


def test_buckets_waste_little() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(2) == [1, 2]
    assert bucket_sizes(9) == [1, 2, 4, 8, 9]
    assert bucket_sizes(256) == [1, 2, 4, *range(8, 257, 8)]
    for most in range(1, 300):
        sizes = bucket_sizes(most)
        assert sizes[-1] == most
        for count in range(1, most + 1):
            size = next(size for size in sizes if size >= count)
            assert size - count < (8 if count > 4 else 4)


def test_what_cannot_be_recorded_runs_eagerly_after_one_warning(
    checkpoint: Path, asks: list[Ask], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qvl.engine"):
        engine = engine_over(checkpoint, Tracer(most=2), max_num_seqs=5)
    assert not steps_of(engine).replays
    [line] = [record.getMessage() for record in caplog.records]
    assert "RuntimeError: out of memory for one more graph; steps run eagerly" in line
    assert "milliseconds a token" in line
    want = run(make_engine(checkpoint, max_model_len=128), asks)
    assert [one.token_ids for one in run(engine, asks)] == [one.token_ids for one in want]


def test_a_row_that_is_not_numbers_fails_alone_in_a_replay(checkpoint: Path) -> None:
    engine = engine_over(checkpoint, Tracer(), max_num_seqs=4, async_scheduling=True)
    good = [Ask([words(i, 10 + i)], greedy(12)) for i in range(3)]
    want = [one.token_ids for one in run(engine, good)]
    end = want[1][5]
    engine.runner.model.model.embed_tokens.weight.data[end] = torch.nan
    broken = run(engine, good)
    for one, tokens in zip(broken, want, strict=True):
        expected = tokens[: tokens.index(end) + 1] if end in tokens[:-1] else tokens
        assert one.token_ids == expected
        assert (one.finish_reason == "error") == (expected != tokens)
