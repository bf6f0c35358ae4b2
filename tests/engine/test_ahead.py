"""Steps launched before the one before them is taken in: random workloads of every kind give the same answers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from qvl.engine.engine import Engine
from qvl.types import Constraint
from tests.engine.harness import Ask, Outcome, greedy, make_engine, pixels, run, words

RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 1},
    {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    {"temperature": 1.0, "top_k": 20, "min_p": 0.02, "seed": 3},
    {"repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 4, "presence_penalty": 0.6, "frequency_penalty": 0.4},
    {"logprobs": 3},
    {"min_tokens": 4, "ignore_eos": False, "logit_bias": {5: 2.0}},
    {"constraint": Constraint.regex("[a-z]{3,9}( [0-9]{2}){2,5}")},
    {"constraint": Constraint.json({"type": "array", "items": {"type": "integer"}, "maxItems": 4}), "logprobs": 0},
    {"constraint": Constraint.choice(["yes", "no", "perhaps"]), "temperature": 1.0, "seed": 5},
]


def random_asks(rng: random.Random, count: int) -> list[Ask]:
    """Shared beginnings, few different pictures, answers of 1 to 30 tokens, some of which end earlier."""
    asks = []
    for number in range(count):
        rules = dict(rng.choice(RULES))
        if "constraint" not in rules and rng.random() < 0.3:
            rules["stop_token_ids"] = tuple(rng.sample(range(600), 60))
        pieces: list[Any] = [words(rng.randrange(2), rng.choice([4, 17, 40]))]
        if rng.random() < 0.4:
            pieces += [pixels(rng.randrange(3), 2, 3), words(number, rng.randint(1, 12))]
        asks.append(Ask(pieces, greedy(rng.randint(rules.get("min_tokens", 1), 30), **rules)))
    return asks


def engine_with(folder: Path, ahead: bool, options: dict[str, Any]) -> Engine:
    return make_engine(folder, async_scheduling=ahead, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 24, "max_num_seqs": 4, "block_size": 5, "num_blocks": 900},
        {"max_model_len": 96, "block_size": 4, "num_blocks": 26, "max_num_batched_tokens": 48},  # preempts
        {"max_model_len": 96, "block_size": 4, "num_blocks": 30, "enable_prefix_caching": False},
    ],
)
def test_random_workloads_give_the_same_answers(checkpoint: Path, options: dict[str, Any]) -> None:
    asks = random_asks(random.Random(str(sorted(options))), 24)
    want, got = (run(engine_with(checkpoint, ahead, options), asks, stagger=2) for ahead in (False, True))
    for number, (one, other) in enumerate(zip(want, got, strict=True)):
        assert one.token_ids == other.token_ids, asks[number].sampling
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert [entry.token_id for entry in one.logprobs] == [entry.token_id for entry in other.logprobs]
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(its.logprob, abs=1e-4)


def test_aborts_at_any_moment_leave_the_others_alone(checkpoint: Path) -> None:
    """What an aborted request has said before is the beginning of its answer, and nothing comes after."""
    rng = random.Random(7)
    asks = random_asks(rng, 30)
    options = {"max_model_len": 96, "block_size": 4, "num_blocks": 40, "max_num_seqs": 6}
    want = [outcome.token_ids for outcome in run(engine_with(checkpoint, False, options), asks)]
    engine = engine_with(checkpoint, True, options)
    outcomes = {f"r{i}": Outcome() for i in range(len(asks))}
    waiting = list(enumerate(asks))
    aborted: set[str] = set()
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            number, ask = waiting.pop(0)
            ask.submit(engine, f"r{number}")
        for output in engine.step():
            assert output.request_id not in aborted
            outcomes[output.request_id].take(output)
        engine.check_integrity()
        victim = f"r{rng.randrange(len(asks))}"
        if rng.random() < 0.15 and engine.abort(victim):
            aborted.add(victim)
            engine.check_integrity()
    assert 3 <= len(aborted) < 25
    for name, outcome in outcomes.items():
        full = want[int(name[1:])]
        assert outcome.token_ids == (full[: len(outcome.token_ids)] if name in aborted else full)
    assert engine.scheduler.blocks.num_used == 0


def test_a_constrained_answer_gains_a_token_in_every_step(checkpoint: Path) -> None:
    """Its forward pass need not wait for the grammar: only the choice does."""
    engine = engine_with(checkpoint, True, {})
    held = greedy(12, constraint=Constraint.regex("[a-z]{30,40}"))
    asks = [Ask([words(1, 6)], held), Ask([words(2, 6)], greedy(12))]
    run(engine, asks[:1])  # from here on the grammar is there already
    steps = engine.stats().steps
    outcomes = run(engine, asks)
    assert [len(outcome.token_ids) for outcome in outcomes] == [12, 12]
    assert engine.stats().steps - steps <= 12 + 2
    assert outcomes[0].token_ids == run(engine_with(checkpoint, False, {}), asks)[0].token_ids


def test_the_step_before_is_taken_in_after_the_next_is_launched(checkpoint: Path) -> None:
    engine = engine_with(checkpoint, True, {})
    Ask([words(1, 6)], greedy(3)).submit(engine, "a")
    calls: list[str] = []
    launch, collect = engine.runner.launch, engine.runner.collect
    engine.runner.launch = lambda batch: calls.append("launch") or launch(batch)  # type: ignore[method-assign, func-returns-value]
    engine.runner.collect = lambda flight: calls.append("collect") or collect(flight)  # type: ignore[method-assign, func-returns-value]
    said = [len(engine.step()) for _ in range(4)]
    assert said == [0, 1, 1, 1]
    assert calls == ["launch", "launch", "collect", "launch", "collect", "collect"]
    assert not engine.has_work
