"""Small steps with prompts over static memory: the answers of plain steps, and shapes that hold what they are given."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from qvl.engine import prompt_graphs
from qvl.engine.inputs import StepNumbers
from qvl.engine.prompt_graphs import MOST_ALONE, MOST_PROMPTS, PromptSteps, Shape, shapes_for
from qvl.layers.attention import cut_prompts
from tests.engine.harness import Ask, greedy, make_engine, pixels, run, words
from tests.engine.test_graphs import Tracer, engine_over, torch_only  # noqa: F401  # a fixture


def test_chunks_prefixes_and_preemption_give_the_answers_of_plain_steps(checkpoint: Path) -> None:
    """Replays of prompts in chunks beside decodes, behind cached prefixes, and again after their blocks were taken."""
    common = words(0, 33)
    asks = [Ask([common, words(i, 3 + 4 * i)], greedy(10 + i)) for i in range(5)]
    asks += [Ask([words(9, 5), pixels(i, 2, 3), words(i, 8)], greedy(50)) for i in range(3)]
    want = [outcome.token_ids for outcome in run(make_engine(checkpoint, max_model_len=128), asks)]
    tracer = Tracer()
    options = {"max_num_seqs": 3, "num_blocks": 9, "async_scheduling": True}
    engine = engine_over(checkpoint, tracer, **options)
    prompts = engine.runner.prompts
    assert prompts is not None
    taken: set[Shape] = set()
    for shape, replay in prompts.replays.items():
        prompts.replays[shape] = lambda shape=shape, replay=replay: (taken.add(shape), replay())[1]  # type: ignore[misc,func-returns-value]
    assert [outcome.token_ids for outcome in run(engine, asks, stagger=2)] == want
    assert taken == set(prompts.shapes)
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_tokens > 0


def test_wider_steps_are_recorded_where_gate_and_up_are_joined(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers; rows of long contexts among them are left to the kernel for those."""
    monkeypatch.setattr(prompt_graphs, "joins_gate_and_up", lambda _: True)
    sizes = {"MOST_NARROW": 8, "MOST_TOKENS": 14, "MOST_JOINED": 20, "SIZE_STEP": 4, "WIDE_STEP": 6, "MOST_ALONE": 8}
    sizes["LONGEST"] = 40
    for name, value in sizes.items():
        monkeypatch.setattr(prompt_graphs, name, value)
    asks = [Ask([words(i, count)], greedy(6 + i)) for i, count in enumerate((12, 18, 33, 60))]
    want = [outcome.token_ids for outcome in run(make_engine(checkpoint, max_model_len=128), asks)]
    tracer = Tracer()
    engine = engine_over(checkpoint, tracer, max_num_seqs=3, async_scheduling=True)
    prompts = engine.runner.prompts
    assert prompts is not None
    assert [shape.tokens for shape in prompts.shapes if shape.decodes] == [4, 8, 14, 20]
    asked: list[tuple[int, int, Shape | None]] = []
    shape_for = prompts.shape_for

    def noting(numbers: StepNumbers) -> Shape | None:
        shape = shape_for(numbers)
        asked.append((len(numbers.token_ids), max(numbers.context_lens[numbers.num_decodes :]), shape))
        return shape

    prompts.shape_for = noting  # type: ignore[method-assign]
    assert [outcome.token_ids for outcome in run(engine, asks, stagger=2)] == want
    for count, longest, shape in asked:
        assert (shape is None) == (count > 20 or (count > 8 and longest > 40))
    assert {14, 20, None} <= {shape and shape.tokens for _, _, shape in asked}


def test_shapes_hold_all_tiles_that_may_come(checkpoint: Path) -> None:
    wide = [shape.tokens for shape in shapes_for(1024) if shape.decodes]
    assert wide == [*range(64, 513, 64), 640, 768, 896, 1024]
    assert [shape.tokens for shape in shapes_for(768)][-3:] == [512, 640, 768]
    assert shapes_for(24) == [Shape(24, decodes=False), Shape(24, decodes=True)]
    sizes = [shape.tokens for shape in shapes_for(500) if shape.decodes]
    assert sizes == [64, 128, 192, 256, 320, 384, 448, 500]
    assert [shape.tokens for shape in shapes_for(500) if not shape.decodes] == [s for s in sizes if s <= MOST_ALONE]
    prompts = engine_over(checkpoint, None, max_num_batched_tokens=500).runner.prompts
    assert isinstance(prompts, PromptSteps)
    tokens = prompts.model.attention.tile_tokens
    rng = random.Random(0)
    for _ in range(2000):
        count = rng.randint(1, MOST_PROMPTS)
        lengths = [rng.choice((1, tokens, tokens + 1, rng.randint(1, 40))) for _ in range(count)]
        tiles = cut_prompts(lengths, lengths, 0, tokens)
        assert tiles[:, 2].sum() == sum(lengths)
        shape = next((shape for shape in prompts.shapes if shape.tokens >= sum(lengths)), None)
        if shape is not None:
            assert len(tiles) <= prompts.num_tiles(shape)


def test_tiles_cover_every_token_once() -> None:
    tiles = cut_prompts([1, 1, 7, 3], [9, 4, 20, 3], 2, 3)
    assert tiles[tiles[:, 1].argsort()].tolist() == [[2, 2, 3, 13], [2, 5, 3, 16], [2, 8, 1, 19], [3, 9, 3, 0]]
    assert (np.diff(tiles[:, 2:].sum(1)) <= 0).all()  # those of many keys first
    assert cut_prompts([1], [5], 1, 3).shape == (0, 4)
