"""The engine as a whole: the same tokens however the work is cut, and one request's trouble stays its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qvl.engine.engine import Engine
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.errors import ConfigError, InvalidRequest, PromptTooLong
from tests.engine import harness
from tests.engine.harness import Ask, greedy, make_config, make_engine, pixels, run, run_alone, words


@pytest.fixture(params=[False, True], ids=["in-turn", "ahead"], autouse=True)
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file holds with `async_scheduling`, too."""
    monkeypatch.setitem(harness.USUAL, "async_scheduling", request.param)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    """Eight requests of all kinds, 16 tokens each."""
    return [
        Ask([words(1, 30)]),
        Ask([words(2, 5), pixels(1, 2, 3), words(3, 9)]),
        Ask([words(4, 3), pixels(2, 4, 1), words(5, 2), pixels(3, 1, 1), pixels(4, 3, 3), words(6, 4)]),
        Ask([words(7, 8), pixels(5, 2, 2, frames=5), words(8, 6)]),
        Ask([words(9, 1)]),
        Ask([words(10, 50), pixels(1, 2, 3), words(11, 3)]),
        Ask([words(12, 4)], greedy(24, temperature=1.0, top_p=0.9, seed=5)),
        Ask([words(13, 20)], greedy(20, repetition_penalty=1.2, frequency_penalty=0.3)),
    ]


@pytest.fixture(scope="module")
def answers(checkpoint: Path, asks: list[Ask]) -> list[list[int]]:
    """Each request served by an engine of its own, in one piece."""
    return [run_alone(checkpoint, ask, enable_prefix_caching=False) for ask in asks]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7, "max_num_seqs": 3},
        {"max_num_batched_tokens": 64, "block_size": 5, "num_blocks": 900},
        {"encoder_budget_tokens": 1, "encoder_cache_memory": 1},
        {"max_model_len": 96, "block_size": 4, "num_blocks": 25, "max_num_batched_tokens": 64},
        {"max_model_len": 90, "block_size": 3, "num_blocks": 30, "max_num_batched_tokens": 33}
        | {"enable_prefix_caching": False},
    ],
)
def test_an_answer_does_not_depend_on_company(
    checkpoint: Path, asks: list[Ask], answers: list[list[int]], options: dict[str, Any]
) -> None:
    engine = make_engine(checkpoint, **options)
    outcomes = run(engine, asks)
    assert [outcome.token_ids for outcome in outcomes] == answers
    if options.get("num_blocks", 256) < 50:
        assert engine.stats().preemptions > 0
    staggered = run(make_engine(checkpoint, **options), asks, stagger=3)
    assert [outcome.token_ids for outcome in staggered] == answers


def test_what_the_cache_held_before_is_of_no_concern(
    checkpoint: Path, asks: list[Ask], answers: list[list[int]]
) -> None:
    engine = make_engine(checkpoint)
    for cache in engine.runner.kv_cache:
        for half in cache:
            half.fill_(torch.nan)
    assert [outcome.token_ids for outcome in run(engine, asks)] == answers


def test_the_second_time_is_cheaper_and_the_same(checkpoint: Path, asks: list[Ask], answers: list[list[int]]) -> None:
    engine = make_engine(checkpoint)
    run(engine, asks)
    encoded = engine.stats().encoded_tokens
    again = run(engine, asks)
    assert [outcome.token_ids for outcome in again] == answers
    # All but the last token, which is computed in any case; all before a picture that begins inside the last block.
    assert [outcome.num_cached_tokens for outcome in again] == [29, 19, 22, 25, 0, 50, 3, 19]
    assert engine.stats().encoded_tokens - encoded <= encoded


def test_another_picture_is_another_prompt(checkpoint: Path) -> None:
    def ask(seed: int, salt: bytes = b"") -> Ask:
        return Ask([words(1, 20), pixels(seed, 4, 5), words(2, 30)], salt=salt)

    engine = make_engine(checkpoint)
    first = run(engine, [ask(1)])[0]
    other = run(engine, [ask(2)])[0]
    again = run(engine, [ask(1)])[0]
    salted = run(engine, [ask(1, salt=b"tenant")])[0]
    assert other.token_ids == run_alone(checkpoint, ask(2), enable_prefix_caching=False) != first.token_ids
    assert other.num_cached_tokens == 20  # all before the picture
    assert again.num_cached_tokens == 69
    assert salted.num_cached_tokens == 0
    assert again.token_ids == salted.token_ids == first.token_ids


def test_seeds_hold_in_company_and_free_requests_differ(checkpoint: Path) -> None:
    mine = Ask([words(1, 9)], greedy(20, temperature=1.0, seed=77))
    alone = run_alone(checkpoint, mine)
    crowd = [Ask([words(i, 5 + i)], greedy(30, temperature=1.5)) for i in range(6)]
    assert run(make_engine(checkpoint), [*crowd, mine], stagger=1)[-1].token_ids == alone
    free = Ask([words(1, 9)], greedy(20, temperature=1.0))
    both = [outcome.token_ids for outcome in run(make_engine(checkpoint), [free, free])]
    assert both[0] != both[1]
    repeated = [outcome.token_ids for outcome in run(make_engine(checkpoint), [free, free])]
    assert repeated == both  # the engine's own seed makes a run repeatable
    assert [outcome.token_ids for outcome in run(make_engine(checkpoint, seed=1), [free, free])] != both


def test_aborting_gives_everything_back(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, max_num_batched_tokens=16, max_num_seqs=2)
    for name in ("a", "b", "c"):
        Ask([words(len(name), 20), pixels(3, 4, 4), words(2, 30)], greedy(1000)).submit(engine, name)
    engine.step()
    assert engine.abort("c")  # waiting
    assert engine.abort("a")  # in the middle of its prompt
    assert not engine.abort("a")
    while not any(output.token_ids for output in engine.step()):
        pass
    engine.step()
    assert engine.abort("b")  # decoding
    engine.check_integrity()
    assert not (engine.has_work and engine.step())  # what was under way says nothing more
    assert not engine.has_work
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_used_fraction, stats.aborted) == (0, 0, 0.0, 3)


def poison(engine: Engine, token_id: int) -> None:
    """Make the embedding of one token overflow."""
    engine.runner.model.model.embed_tokens.weight.data[token_id] = torch.inf


@pytest.mark.parametrize("chunk", [2048, 16])
def test_logits_that_are_no_numbers_end_one_request(checkpoint: Path, chunk: int) -> None:
    good = [Ask([words(i, 10 + 7 * i)], greedy(24)) for i in range(4)]
    want = [run_alone(checkpoint, ask) for ask in good]
    engine = make_engine(checkpoint, max_num_batched_tokens=chunk, max_num_seqs=8)
    poison(engine, 7)
    clean = [word for word in words(50, 60) if word != 7]
    bad = Ask([[*clean[:20], 7, *clean[20:]]])
    for _ in range(3):
        outcomes = run(engine, [good[0], bad, *good[1:], bad], stagger=1)
        assert [outcomes[i].token_ids for i in (0, 2, 3, 4)] == want
        for broken in (outcomes[1], outcomes[5]):
            assert broken.finish_reason == "error"
            assert broken.token_ids == []
            assert "finite" in (broken.error or "")
    assert engine.stats().failed == 6


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("tokens", [12, 256])  # a step takes a part of the picture, or all of it
def test_a_picture_too_large_for_memory_fails_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, ahead: bool
) -> None:
    """Also when the next part of it is launched before anybody heard of the failure."""
    engine = make_engine(checkpoint, max_num_batched_tokens=tokens, async_scheduling=ahead)
    encode = engine.runner.model.encode_media

    def limited(parts: list[torch.Tensor], grids: Any) -> torch.Tensor:
        if sum(map(len, parts)) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(parts, grids)

    monkeypatch.setattr(engine.runner.model, "encode_media", limited)
    small = Ask([words(1, 5), pixels(1, 4, 4), words(2, 5)])
    large = Ask([words(3, 5), pixels(2, 8, 8), words(4, 5)])
    outcomes = run(engine, [large, small, large, Ask([words(9, 4)])])
    assert [outcome.finish_reason for outcome in outcomes] == ["error", "length", "error", "length"]
    assert "out of memory" in (outcomes[0].error or "")
    assert outcomes[1].token_ids == run_alone(checkpoint, small)
    assert run(engine, [large, small])[1].token_ids == outcomes[1].token_ids


def test_no_memory_for_a_step_fails_its_requests_and_not_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(checkpoint)
    ask = Ask([words(1, 12)])

    def exhausted(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.model, "forward", exhausted)
        failed = run(engine, [ask, Ask([words(2, 30)])])
    assert [outcome.finish_reason for outcome in failed] == ["error", "error"]
    assert run(engine, [ask])[0].token_ids == run_alone(checkpoint, ask)


def test_a_bug_in_a_step_is_not_swallowed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(checkpoint)

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(engine.runner.model, "forward", broken)
    Ask([words(1, 12)]).submit(engine, "a")
    with pytest.raises(RuntimeError, match="mat1"):
        engine.step()


def test_end_tokens_lengths_and_stop_ids(checkpoint: Path) -> None:
    ask = Ask([words(1, 9)], greedy(40))
    tokens = run_alone(checkpoint, ask)
    stop = tokens[12]
    first = tokens.index(stop)
    engine = make_engine(checkpoint)
    end = engine.config.spec.ids.eos[0]
    stopped = run(engine, [Ask(ask.pieces, greedy(40, stop_token_ids=(stop,)))])[0]
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (tokens[: first + 1], "stop", stop)
    forced = {end: 100.0}
    ended = run(engine, [Ask(ask.pieces, greedy(40, logit_bias=forced, ignore_eos=False))])[0]
    assert (ended.token_ids, ended.finish_reason, ended.stop_reason) == ([end], "stop", None)
    late = run(engine, [Ask(ask.pieces, greedy(40, logit_bias=forced, ignore_eos=False, min_tokens=6))])[0]
    assert (late.token_ids.index(end), late.finish_reason) == (6, "stop")
    ignored = run(engine, [Ask(ask.pieces, greedy(5, logit_bias=forced))])[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([end] * 5, "length")


def test_the_context_ends_the_answer(checkpoint: Path) -> None:
    engine = make_engine(checkpoint, max_model_len=32)
    outcome = run(engine, [Ask([words(1, 30)], greedy(100))])[0]
    assert (len(outcome.token_ids), outcome.finish_reason) == (2, "length")
    with pytest.raises(PromptTooLong):
        Ask([words(1, 32)]).submit(engine, "long")
    assert not engine.has_work


def test_logprobs_come_with_every_token(checkpoint: Path) -> None:
    outcomes = run(make_engine(checkpoint), [Ask([words(1, 9)], greedy(8, logprobs=2)), Ask([words(2, 9)])])
    assert [entry.token_id for entry in outcomes[0].logprobs] == outcomes[0].token_ids
    assert all(entry.top[0] == (entry.token_id, entry.logprob) for entry in outcomes[0].logprobs)
    assert outcomes[1].logprobs == []


def _media(**changes: Any) -> MediaInput:
    usual = {"kind": "image", "offset": 1, "length": 4, "t": 1, "h": 4, "w": 4, "digest": b"d" * 16}
    return MediaInput(**{**usual, "height": 56, "width": 56, **changes})


@pytest.mark.parametrize(
    ("ids", "media", "arrays"),
    [
        ([1, 99999], [], []),
        ([-1], [], []),
        ([], [], []),
        ([1] * 8, [_media()], []),
        ([1] * 8, [_media()], [None]),
        ([1] * 8, [_media()], [np.zeros((1, 56, 56, 3), np.float32)]),
        ([1] * 8, [_media()], [np.zeros((56, 56, 3), np.uint8)]),
        ([1] * 8, [_media(height=57)], [np.zeros((1, 57, 56, 3), np.uint8)]),
        ([1] * 8, [_media(length=5)], [np.zeros((1, 56, 56, 3), np.uint8)]),
        ([1] * 8, [_media()], [np.zeros((3, 56, 56, 3), np.uint8)]),
        ([1] * 4, [_media()], [np.zeros((1, 56, 56, 3), np.uint8)]),
        ([1] * 9, [_media(), _media(offset=4)], [np.zeros((1, 56, 56, 3), np.uint8)] * 2),
    ],
)
def test_requests_that_contradict_themselves_do_not_enter(
    checkpoint: Path, ids: list[int], media: list[MediaInput], arrays: list[Any]
) -> None:
    engine = make_engine(checkpoint)
    with pytest.raises(InvalidRequest):
        engine.add(AddRequest("a", ids, media, greedy()), arrays)
    assert not engine.has_work
    good = AddRequest("a", [1] * 8, [_media()], greedy(3))
    engine.add(good, [np.zeros((1, 30, 90, 3), np.uint8)])  # another size than the model's: the device resizes
    with pytest.raises(InvalidRequest):
        engine.add(good, [np.zeros((1, 56, 56, 3), np.uint8)])  # an id in use


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_encoder_cache_stays_within_its_bytes(checkpoint: Path, dtype: str) -> None:
    one = 16 * 64 * 4  # tokens x hidden size x fp32, the dtype of activations on a CPU
    engine = make_engine(checkpoint, encoder_cache_memory=3 * one, dtype=dtype)
    for seed in range(8):
        run(engine, [Ask([words(seed, 3), pixels(seed, 4, 4), words(1, 3)], greedy(2))])
        assert engine.stats().encoder_cache_bytes <= 3 * one
        cache = engine.runner.encoder_cache
        held = [entry.value.untyped_storage().nbytes() for entry in cache._entries.values() if entry.value is not None]
        assert sum(held) <= 3 * one


def test_the_ready_line_has_its_numbers(checkpoint: Path) -> None:
    info = make_engine(checkpoint, max_model_len=512).info
    assert (info.num_blocks, info.block_size, info.kv_tokens) == (256, 16, 4096)
    assert info.weight_bytes == make_config(checkpoint).spec.num_parameters * 4
    assert info.kv_cache_bytes == 4096 * 2 * 2 * 2 * 16 * 4
    with pytest.raises(ConfigError, match="max_model_len"):
        make_engine(checkpoint, max_model_len=512, num_blocks=3)
