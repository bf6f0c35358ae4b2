"""Which pictures go along with those of a step: planned by the scheduler, over a fake model that checks its input."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest

from qvl.engine.batch import StepResult
from qvl.engine.pixels import PromisedPixels
from qvl.types import SamplingParams
from tests.engine.fake_model import Limits, expected, request
from tests.engine.test_scheduler import Bench

A, B, C, D = (letter * 16 for letter in (b"A", b"B", b"C", b"D"))
LONG = SamplingParams(max_tokens=8, ignore_eos=True)


def encoded(bench: Bench) -> list[bytes]:
    """By one step."""
    return [media.span.digest for media in bench.step().encode]


def test_pictures_of_those_who_wait_go_along_and_are_not_encoded_again() -> None:
    """Only where the tower runs anyway, and as far as the step's budget reaches."""
    bench = Bench(Limits(max_num_batched_tokens=8, encoder_budget_tokens=9))
    asked = [request(name, [1, (3, digest), 2], LONG) for name, digest in zip("abcd", (A, B, C, D), strict=True)]
    for one in asked:
        bench.add(one)
    assert encoded(bench) == [A, B, C]
    assert [seq.pinned for seq in bench.scheduler.waiting] == [{0}, set()]
    steps = [encoded(bench) for _ in range(3)]
    assert [digest for step in steps for digest in step] == [D]
    bench.run()
    assert bench.runner.encoded == [A, B, C, D]
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)
    stats = bench.scheduler.stats()
    assert (stats.encoder_queries, stats.encoder_hits, stats.encoded_tokens) == (4, 0, 12)
    bench.idle()


def test_a_picture_whose_keys_are_cached_is_not_encoded_ahead() -> None:
    bench = Bench(Limits(max_num_batched_tokens=8, encoder_budget_tokens=9), num_blocks=32, cache=6)
    seen: list[int | tuple[int, bytes]] = [1, (3, A), 2, 3, 4]
    bench.add(request("seen", seen, SamplingParams(max_tokens=1)))
    bench.run()
    assert bench.cache.reserve(b"other", 6, "test")  # the picture itself is forgotten
    bench.cache.unpin(b"other", "test")
    bench.add(request("new", [5, (3, B), 6, 7, 8, 9], LONG))
    bench.add(request("again", [*seen, 5, 6], LONG))
    bench.run()
    assert bench.runner.encoded == [A, B]


@pytest.mark.parametrize(("seqs", "steps"), [(1, [[A, C], [B], [C, D]]), (8, [[A, C], [D], [B]])])
def test_half_of_the_cache_is_left_and_the_other_half_given_back(seqs: int, steps: list[list[bytes]]) -> None:
    """A sequence that cannot go on without a picture gets room, also if nobody else may run meanwhile."""
    bench = Bench(Limits(max_num_seqs=seqs, max_num_batched_tokens=9), cache=10)
    late = request("late", [1, (9, B), 2], LONG)
    promised = np.zeros((1, 28, 28, 3), np.uint8).view(PromisedPixels)
    promised.room, promised.place, promised.soon = mmap.mmap(-1, 1), 0, 0.0
    bench.add(late).pixels[0] = promised
    others = [
        request(name, [i, (2, digest), 8], LONG) for i, (name, digest) in enumerate(zip("acd", (A, C, D), strict=True))
    ]
    for one in others:
        bench.add(one)
    found = [encoded(bench)]
    promised.room[0] = 1
    while bench.scheduler.has_work:
        found.append(encoded(bench))
    assert [step for step in found if step] == steps
    for one in (late, *others):
        assert bench.tokens(one.request_id) == expected(one, bench.limits)
    bench.idle()


def test_who_is_aborted_or_preempted_lets_go_of_what_was_encoded_ahead() -> None:
    bench = Bench(Limits(max_num_batched_tokens=5))
    for name, digest in zip("abc", (A, B, C), strict=True):
        bench.add(request(name, [1, (3, digest), 2], LONG))
    assert encoded(bench) == [A, B, C]
    assert bench.scheduler.abort("b")
    bench.scheduler.check_integrity()
    bench.run()
    bench.idle()


def test_what_could_not_be_encoded_ahead_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure of a picture that nobody needed yet fails nobody."""
    bench = Bench(Limits(max_num_batched_tokens=5))
    run, broken = bench.runner.run, [B]

    def without(batch: Any) -> StepResult:
        batch.encode[:] = [media for media in batch.encode if media.span.digest not in broken]
        return run(batch)

    asked = [request("a", [1, (3, A), 2], LONG), request("b", [1, (3, B), 2], LONG)]
    for one in asked:
        bench.add(one)
    batch = bench.schedule()
    planned = list(batch.encode)
    assert [media.span.digest for media in planned] == [A, B]
    result = without(batch)
    batch.encode[:] = planned
    bench.take(bench.scheduler.finish(batch, result))
    assert not bench.scheduler.waiting[0].pinned
    broken.clear()
    bench.run()
    assert bench.runner.encoded == [A, B]
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)
