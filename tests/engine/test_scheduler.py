"""The scheduler with a fake model over real blocks: whatever the schedule, every answer is the one it has alone."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.engine.batch import ScheduledBatch, StepResult
from qvl.engine.block_manager import BlockManager
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.pixels import PromisedPixels
from qvl.engine.protocol import AddRequest, TokenOutput
from qvl.engine.scheduler import Scheduler
from qvl.engine.sequence import Sequence
from qvl.errors import ConfigError, InvalidRequest, PromptTooLong
from qvl.prompt import Opening
from qvl.types import SamplingParams, TokenLogprob
from tests.engine.fake_model import EOS, VOCAB, FakeRunner, Limits, expected, request, tiny_spec

SPEC = tiny_spec()
A, B, C = b"A" * 16, b"B" * 16, b"C" * 16
ONE = SamplingParams(max_tokens=1)


class Bench:
    """A scheduler with its fake runner; `outputs` collects what each request was told."""

    def __init__(
        self,
        limits: Limits | None = None,
        num_blocks: int = 16,
        block_size: int = 4,
        prefix: bool = True,
        cache: int = 64,
    ) -> None:
        self.limits = limits or Limits()
        self.blocks = BlockManager(num_blocks, block_size, prefix)
        self.cache: EncoderCache[object] = EncoderCache(cache)
        self.scheduler = Scheduler(self.limits, self.blocks, self.cache)
        self.runner = FakeRunner(num_blocks, block_size, self.cache)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.in_flight: tuple[ScheduledBatch, StepResult] | None = None

    def add(self, asked: AddRequest) -> Sequence:
        seq = Sequence.create(asked, SPEC, block_size=self.blocks.block_size, fallback_seed=0)
        self.scheduler.add(seq)
        self.outputs[asked.request_id] = []
        return seq

    def schedule(self) -> ScheduledBatch:
        """A step's plan, and what holds for the queues behind every plan."""
        running, preemptions = set(self.scheduler.running), self.scheduler.stats().preemptions
        batch = self.scheduler.schedule()
        self.scheduler.check_integrity()
        for queue in (self.scheduler.waiting, self.scheduler.running):
            assert [seq.arrival for seq in queue] == sorted(seq.arrival for seq in queue)
        assert not any(seq.num_computed for seq in self.scheduler.waiting)
        if self.scheduler.stats().preemptions > preemptions:
            assert running.issuperset(self.scheduler.running), "one came in while another had to give way"
        return batch

    def step(self) -> ScheduledBatch:
        batch = self.schedule()
        self.check(batch)
        self.take(self.scheduler.finish(batch, self.runner.run(batch)))
        return batch

    def step_ahead(self) -> None:
        """Plan and run a step before the one before it is taken in."""
        batch = self.schedule()
        ahead: tuple[ScheduledBatch, StepResult] | None = None
        if batch:
            self.check(batch)
            ahead = (batch, self.runner.run(batch))
        if self.in_flight is not None:
            self.take(self.scheduler.finish(*self.in_flight))
        self.in_flight = ahead

    def take(self, outputs: list[TokenOutput]) -> None:
        self.scheduler.check_integrity()
        for output in outputs:
            said = self.outputs[output.request_id]
            assert not said or said[-1].finish_reason is None, "something was said after the end"
            said.append(output)

    def check(self, batch: ScheduledBatch) -> None:
        assert 1 <= batch.num_tokens <= self.limits.max_num_batched_tokens
        assert len(batch.seqs) <= self.limits.max_num_seqs
        assert len({entry.seq.request_id for entry in batch.seqs}) == len(batch.seqs)
        for number, entry in enumerate(batch.seqs):
            if number < batch.num_decodes:
                assert entry.num_tokens == 1
                assert entry.samples
            assert entry.samples == (entry.end == entry.seq.num_tokens + entry.seq.num_pending - entry.samples)
        vision = sum(media.span.length for media in batch.encode)
        assert vision <= self.limits.encoder_budget_tokens or len(batch.encode) == 1

    def run(self, max_steps: int = 5000) -> None:
        while self.scheduler.has_work:
            self.step()
            max_steps -= 1
            assert max_steps > 0, "no end"

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def idle(self) -> None:
        assert self.blocks.num_used == 0
        self.blocks.check_integrity()
        assert self.cache.reserve(b"everything", self.cache.capacity_bytes, "test"), "something is still pinned"


def random_request(rng: random.Random, number: int, limits: Limits) -> AddRequest:
    """Prompts with long shared beginnings and few pictures, so that blocks and embeddings are shared a lot."""
    system = [1] * rng.choice([0, 3, 8, 9])
    parts: list[int | tuple[int, bytes]] = list(system)
    for _ in range(rng.randrange(4)):
        if rng.random() < 0.5:
            parts.append((rng.choice([1, 3, 7, 12]), rng.choice([A, B, C])))
        parts += [rng.randrange(3) for _ in range(rng.randrange(7))]
    parts.append(2)
    room = limits.max_model_len - sum(1 if isinstance(part, int) else part[0] for part in parts)
    if room < 1:
        return random_request(rng, number, limits)
    max_tokens = rng.randint(1, room)
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice([0, rng.randint(0, max_tokens)]),
        ignore_eos=rng.random() < 0.5,
        stop_token_ids=tuple(rng.sample(range(VOCAB), rng.choice([0, 2]))),
    )
    # A picture's length belongs to its digest, as in life.
    fixed = [(part[0], bytes([part[0]]) + part[1][1:]) if isinstance(part, tuple) else part for part in parts]
    return request(f"r{number}", fixed, sampling, rng.choice([b"", b"", b"tenant"]))


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), ahead=st.booleans())
def test_answers_do_not_depend_on_the_schedule(seed: int, ahead: bool) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4, 5])
    max_len = rng.choice([24, 40, 60])
    limits = Limits(
        max_model_len=max_len,
        max_num_seqs=rng.choice([1, 3, 8]),
        max_num_batched_tokens=rng.choice([1, 3, 16, 64]),
        max_num_mixed_tokens=rng.choice([1, 5, 64]),
        encoder_budget_tokens=rng.choice([1, 8, 64]),
    )
    num_blocks = -(-max_len // block_size) + rng.choice([0, 1, 10])
    bench = Bench(limits, num_blocks, block_size, prefix=rng.random() < 0.7, cache=rng.choice([0, 8, 20, 100]))
    asked = [random_request(rng, number, limits) for number in range(rng.randint(1, 12))]
    pending = list(asked)
    aborted = set()
    while pending or bench.scheduler.has_work or bench.in_flight:
        while pending and (not bench.scheduler.has_work or rng.random() < 0.4):
            bench.add(pending.pop())
        if rng.random() < 0.05:
            victim = rng.choice(asked).request_id
            if bench.scheduler.abort(victim):
                aborted.add(victim)
                bench.scheduler.check_integrity()
        if ahead:
            bench.step_ahead()
        elif bench.scheduler.has_work:
            bench.step()
    for one in asked:
        alone, got = expected(one, limits), bench.tokens(one.request_id)
        reasons = [output.finish_reason for output in bench.outputs[one.request_id] if output.finish_reason]
        if one.request_id in aborted:
            assert got == alone[: len(got)]
            assert reasons == []
        else:
            assert got == alone
            assert len(reasons) == 1
    bench.idle()


def test_nothing_is_computed_in_vain_when_a_step_is_planned_ahead() -> None:
    """The last token of an answer is known to be the last before its id is; only an end token comes as a surprise."""
    bench = Bench(Limits(max_model_len=12))
    asked = [request(f"r{i}", [i] * 4, SamplingParams(max_tokens=n, ignore_eos=True)) for i, n in enumerate((1, 5, 8))]
    for one in asked:
        bench.add(one)
    while bench.scheduler.has_work or bench.in_flight:
        bench.step_ahead()
    assert bench.runner.num_computed == 3 * 4 + (1 - 1) + (5 - 1) + (8 - 1)
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)


def test_preemption_happens_and_the_newest_gives_way() -> None:
    bench = Bench(Limits(max_model_len=40), num_blocks=12)
    asked = [request(f"r{i}", [i] * 14, SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(3)]
    seqs = [bench.add(one) for one in asked]
    bench.run()
    assert bench.scheduler.stats().preemptions > 0
    assert seqs[0].num_preemptions == 0
    assert seqs[2].num_preemptions >= 1
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)


def test_decodes_come_first_and_prefills_fill_the_budget() -> None:
    bench = Bench(Limits(max_num_batched_tokens=10))
    bench.add(request("short", [1, 2, 3], SamplingParams(max_tokens=10, ignore_eos=True)))
    bench.step()
    bench.add(request("long", [4] * 25))
    bench.add(request("next", [5] * 5))
    shapes = [[(e.seq.request_id, e.num_tokens, e.samples) for e in bench.step().seqs] for _ in range(3)]
    assert shapes == [
        [("short", 1, True), ("long", 9, False)],
        [("short", 1, True), ("long", 9, False)],
        [("short", 1, True), ("long", 7, True), ("next", 2, False)],
    ]


def test_prompts_and_pictures_give_way_to_decodes() -> None:
    """Alone they take the whole budget, beside decodes a part of it; one picture above that part may go alone, and what
    comes next goes along."""
    bench = Bench(Limits(max_num_batched_tokens=30, max_num_mixed_tokens=6, encoder_budget_tokens=30))
    bench.add(request("text", [1] * 24, SamplingParams(max_tokens=10, ignore_eos=True)))
    assert [entry.num_tokens for entry in bench.step().seqs] == [24]
    bench.add(request("pictures", [4, (8, A), (3, B), (3, C), 5], SamplingParams(max_tokens=2, ignore_eos=True)))
    taken = []
    while len(bench.outputs["pictures"]) < 1:
        batch = bench.step()
        assert batch.num_decodes == 1
        taken.append((batch.num_tokens - 1, [media.span.digest for media in batch.encode]))
    assert taken == [(5, [A]), (5, [B, C]), (5, []), (1, [])]


def test_prompts_are_not_shut_out_by_many_decodes() -> None:
    """A quarter of a mixed step is theirs, however many decodes there are."""
    bench = Bench(Limits(max_num_batched_tokens=30, max_num_mixed_tokens=8, max_num_seqs=16), num_blocks=60)
    for i in range(10):
        bench.add(request(f"short {i}", [1], SamplingParams(max_tokens=10, ignore_eos=True)))
    bench.step()
    bench.add(request("text", [2] * 9))
    batch = bench.step()
    assert (batch.num_decodes, batch.num_tokens) == (10, 12)


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    bench = Bench(Limits(max_num_batched_tokens=64))
    for name in "abc":
        bench.add(request(name, [1, 2, 3, 4] * 3, SamplingParams(max_tokens=1)))
    assert [entry.seq.request_id for entry in bench.step().seqs] == ["a"]
    bench.run()
    assert bench.runner.num_computed == 12 + 2 * 1  # the others' last tokens, which choose the next


def test_shared_prefix_is_computed_once_and_the_last_token_always() -> None:
    bench = Bench()
    first = bench.add(request("a", [1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(max_tokens=1)))
    bench.run()
    again = bench.add(request("b", [1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(max_tokens=1)))
    before = bench.runner.num_computed
    bench.run()
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 7)
    assert bench.runner.num_computed - before == 1
    assert bench.tokens("a") == bench.tokens("b")
    assert bench.outputs["b"][-1].num_cached_tokens == 7


def test_a_beginning_shorter_than_a_block_is_copied() -> None:
    bench = Bench()
    asked = [
        request("a", [1, 2, 3, 4, 5, 6, 7, 8]),
        request("longest", [1, 2, 3, 4, 5, 6, 9, 9]),
        request("first", [1, 2, 9, 9, 9]),
        request("nothing", [9, 2, 3, 4, 5]),
        request("inside", [1, 2, 3]),
    ]
    copies = []
    for one in asked:
        bench.add(one)
        copies.append(len(bench.step().copies))
        bench.run()
        assert bench.tokens(one.request_id) == expected(one, bench.limits)
    assert copies == [0, 1, 1, 0, 1]
    assert [bench.outputs[one.request_id][-1].num_cached_tokens for one in asked] == [0, 6, 2, 0, 2]
    assert bench.scheduler.stats().prefix_hit_tokens == 10


def test_without_a_prefix_cache_nothing_is_copied() -> None:
    bench = Bench(prefix=False)
    for name in "ab":
        bench.add(request(name, [1, 2, 3, 4, 5, 6, 7, 8]))
        assert bench.step().copies == []
        bench.run()


def test_what_is_thrown_out_for_a_new_block_was_copied_before() -> None:
    """The one block that is left for a request is the one whose beginning it shares."""
    bench = Bench(Limits(max_model_len=8), num_blocks=2)
    first, second = request("a", [1, 2, 3, 4, 5, 6], ONE), request("b", [1, 2, 3, 9, 9, 9], ONE)
    bench.add(first)
    bench.run()
    seq = bench.add(second)
    bench.run()
    assert bench.tokens("b") == expected(second, bench.limits)
    assert seq.num_cached_tokens in (0, 3)


def test_generated_blocks_serve_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    first = request("a", [(2, A), 2], SamplingParams(max_tokens=10, ignore_eos=True))
    bench.add(first)
    bench.run()
    follow_up = request("b", [(2, A), 2, *bench.tokens("a"), 3], SamplingParams(max_tokens=2))
    seq = bench.add(follow_up)
    bench.run()
    # 3 prompt and 9 computed output tokens: three full blocks, the first with the picture and generated text
    assert seq.num_cached_tokens == 12
    assert bench.runner.encoded == [A]
    assert bench.tokens("b") == expected(follow_up, bench.limits)


def test_equal_ids_with_other_pictures_never_share_a_block() -> None:
    """The block that mixes a picture's end with generated text is told apart although all its ids are the same."""
    bench = Bench()
    a = bench.add(request("a", [(2, A), 2], SamplingParams(max_tokens=12)))
    b = bench.add(request("b", [(2, B), 2], SamplingParams(max_tokens=12)))
    scripted(bench, lambda i: 1)
    assert a.token_ids == b.token_ids
    assert len(a.keys) == len(b.keys) == 3
    assert not set(a.keys) & set(b.keys)


def test_nobody_is_admitted_into_the_last_blocks_of_those_who_run() -> None:
    bench = Bench(Limits(max_model_len=16), num_blocks=4)
    bench.add(request("a", [1] * 11, SamplingParams(max_tokens=5, ignore_eos=True)))
    bench.step()
    bench.add(request("b", [2] * 3))
    bench.run()
    assert bench.scheduler.stats().preemptions == 0


def test_equal_prompts_at_once_are_computed_once_and_let_others_pass() -> None:
    bench = Bench(Limits(max_num_batched_tokens=12), num_blocks=40)
    prompt: list[int | tuple[int, bytes]] = [1, (9, A), *range(10)]
    asked = [request(f"r{i}", prompt, SamplingParams(max_tokens=2, ignore_eos=True)) for i in range(4)]
    asked.append(request("other", [7] * 6, SamplingParams(max_tokens=4, ignore_eos=True)))
    for one in asked:
        bench.add(one)
    first, second = bench.step(), bench.step()
    assert [entry.seq.request_id for entry in first.seqs] == ["r0"]
    assert [entry.seq.request_id for entry in second.seqs] == ["r0", "other"]
    bench.run()
    assert bench.runner.num_computed == 20 + 3 * 1 + 6 + 4 * 1 + 3
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)


def test_who_waits_for_a_prefix_goes_on_alone_when_it_does_not_come() -> None:
    bench = Bench(Limits(max_num_batched_tokens=8))
    for name in ("a", "b"):
        bench.add(request(name, [1] * 20))
    bench.step()
    assert bench.scheduler.abort("a")
    assert bench.step().seqs[0].start == 8
    bench.run()
    assert bench.tokens("b") == expected(request("b", [1] * 20), bench.limits)


def test_little_in_common_is_not_waited_for() -> None:
    bench = Bench(Limits(max_num_batched_tokens=64))
    bench.add(request("a", [1] * 12))
    bench.add(request("b", [1, 1, 1, 1, *[2] * 8]))
    assert len(bench.step().seqs) == 2


def test_tenants_share_nothing() -> None:
    bench = Bench()
    for name, salt in (("a", b"x"), ("b", b"y"), ("c", b"x")):
        bench.add(request(name, [1] * 12, SamplingParams(max_tokens=1), salt))
        bench.run()
    cached = [bench.outputs[name][-1].num_cached_tokens for name in "abc"]
    assert cached == [0, 0, 11]


def test_a_picture_is_encoded_once_for_all_who_show_it() -> None:
    bench = Bench(Limits(max_num_batched_tokens=64), prefix=False)
    for number in range(3):
        bench.add(request(f"r{number}", [number, (5, A), 1]))
    bench.run()
    assert bench.runner.encoded == [A]
    stats = bench.scheduler.stats()
    assert (stats.encoder_queries, stats.encoder_hits, stats.encoded_tokens) == (3, 2, 5)


def test_a_picture_inside_the_cached_prefix_is_never_encoded() -> None:
    bench = Bench(cache=5)
    parts: list[int | tuple[int, bytes]] = [1, (5, A), 1, 1, 1]
    bench.add(request("a", parts))
    bench.run()
    bench.add(request("other", [9, (5, B), 1]))  # pushes A out of the encoder cache
    bench.run()
    bench.add(request("b", [*parts, 2]))
    bench.run()
    assert bench.runner.encoded == [A, B]
    bench.add(request("c", [1, (5, A), 2]))  # the end of the picture lies in a block that goes on differently
    bench.run()
    assert bench.runner.encoded == [A, B]
    bench.add(request("d", [1, (5, A)]))  # its last token, a picture's, is computed in any case
    bench.run()
    assert bench.runner.encoded == [A, B, A]


def test_a_chunk_stops_before_a_picture_that_must_wait() -> None:
    bench = Bench(Limits(max_num_batched_tokens=64, encoder_budget_tokens=6))
    bench.add(request("a", [1, (5, A), 1, 1, (5, B), 1]))
    batch = bench.step()
    assert [(entry.num_tokens, len(batch.encode)) for entry in batch.seqs] == [(8, 1)]
    batch = bench.step()
    assert [(entry.num_tokens, len(batch.encode)) for entry in batch.seqs] == [(6, 1)]


def test_a_picture_above_the_encoder_budget_and_the_cache_is_encoded_alone() -> None:
    bench = Bench(Limits(max_num_batched_tokens=7, encoder_budget_tokens=4), cache=6)
    asked = [request("a", [1, (20, A), 1]), request("b", [2, (20, B), 1])]
    for one in asked:
        bench.add(one)
    bench.run()
    assert bench.runner.encoded == [A, B]
    for one in asked:
        assert bench.tokens(one.request_id) == expected(one, bench.limits)


def test_an_abort_frees_at_once_what_runs_and_what_waits() -> None:
    bench = Bench(Limits(max_num_seqs=1))
    bench.add(request("runs", [1, (5, A), 1]))
    bench.add(request("waits", [2] * 5))
    bench.scheduler.finish(batch := bench.scheduler.schedule(), bench.runner.run(batch))
    assert bench.scheduler.abort("runs")
    assert bench.blocks.num_used == 0
    assert bench.scheduler.abort("waits")
    assert not bench.scheduler.has_work
    assert not bench.scheduler.abort("waits")
    bench.idle()
    assert bench.scheduler.stats().aborted == 2


def test_an_abort_between_schedule_and_finish_says_nothing_more() -> None:
    bench = Bench()
    bench.add(request("a", [1, (5, A), 1]))
    bench.add(request("b", [2] * 5))
    batch = bench.scheduler.schedule()
    result = bench.runner.run(batch)
    bench.scheduler.abort("a")
    assert [output.request_id for output in bench.scheduler.finish(batch, result)] == ["b"]
    bench.scheduler.check_integrity()


def test_a_failed_sequence_ends_with_its_error_and_the_others_go_on() -> None:
    bench = Bench(Limits(max_num_batched_tokens=64))
    asked = [request("bad", [1, (5, A), 1]), request("good", [2] * 5)]
    for one in asked:
        bench.add(one)
    batch = bench.scheduler.schedule()
    for media in batch.encode:  # the picture could not be encoded: nothing was put, nothing of it may stay
        assert media.span.digest == A
    fine = bench.runner._compute(batch.seqs[1])
    assert fine
    result = StepResult([0, expected(asked[1], bench.limits)[0]], errors={"bad": "the picture is broken"})
    bench.take(bench.scheduler.finish(batch, result))
    assert bench.outputs["bad"] == [TokenOutput("bad", [], finish_reason="error", error="the picture is broken")]
    assert A not in bench.cache
    bench.run()
    assert bench.tokens("good") == expected(asked[1], bench.limits)
    bench.add(request("again", [1, (5, A), 1]))
    bench.run()
    assert bench.runner.encoded == [A]
    bench.idle()


def scripted(bench: Bench, choose: Callable[[int], int]) -> list[TokenOutput]:
    """Run everything with sampled tokens of the test's choosing, by their number in the answer."""
    said: list[TokenOutput] = []
    while bench.scheduler.has_work:
        batch = bench.scheduler.schedule()
        for media in batch.encode:
            bench.cache.put(media.span.digest, "embedding")
        said += bench.scheduler.finish(batch, StepResult([choose(entry.seq.num_output) for entry in batch.sampling]))
    return said


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason", "stop"),
    [
        (SamplingParams(max_tokens=5), [1, 2, EOS[1]], "stop", None),
        (SamplingParams(max_tokens=3), [1, 2, 3], "length", None),
        (SamplingParams(max_tokens=5, ignore_eos=True), [1, EOS[0], 2, 3, 4], "length", None),
        (SamplingParams(max_tokens=5, stop_token_ids=(7,)), [1, 7], "stop", 7),
        (SamplingParams(max_tokens=5, ignore_eos=True, stop_token_ids=(7,)), [EOS[0], 7], "stop", 7),
        (SamplingParams(max_tokens=2), [1, EOS[0]], "stop", None),
        (SamplingParams(max_tokens=100, ignore_eos=True), [1] * 56, "length", None),
    ],
)
def test_why_an_answer_ends(sampling: SamplingParams, tokens: list[int], reason: str, stop: int | None) -> None:
    bench = Bench()
    seq = bench.add(request("a", [1] * 8, sampling))
    said = scripted(bench, lambda i: tokens[i])
    assert [token for output in said for token in output.token_ids] == tokens
    assert (said[-1].finish_reason, said[-1].stop_reason) == (reason, stop)
    assert seq.finish_reason == reason


def test_end_tokens_are_banned_until_min_tokens_are_there() -> None:
    params = SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=(5,), ignore_eos=True)
    sampling = Bench().add(request("a", [1], params)).sampling
    assert [sampling.banned(n) for n in range(5)] == [(5, *EOS)] * 3 + [()] * 2
    assert sampling.stop_ids == {5}


def test_logprobs_reach_the_request_that_asked() -> None:
    bench = Bench()
    bench.add(request("a", [1] * 3))
    bench.add(request("b", [2] * 3))
    batch = bench.scheduler.schedule()
    entry = TokenLogprob(4, -0.5)
    said = bench.scheduler.finish(batch, StepResult([4, 4], [None, entry]))
    assert [output.logprobs for output in said] == [None, [entry]]


def test_what_cannot_be_served_is_refused() -> None:
    bench = Bench(Limits(max_model_len=10))
    bench.add(request("fits", [1] * 9))
    with pytest.raises(PromptTooLong):
        bench.add(request("long", [1] * 10))
    with pytest.raises(InvalidRequest, match="empty"):
        bench.add(request("empty", []))
    with pytest.raises(InvalidRequest, match="already"):
        bench.add(request("fits", [1]))
    with pytest.raises(ConfigError, match="fewer than max_model_len"):
        Bench(Limits(max_model_len=65))
    bench.run()


def test_who_waits_for_pixels_lets_others_pass_and_comes_when_they_have_come() -> None:
    bench = Bench()
    room = mmap.mmap(-1, 8192)
    promised = np.zeros((1, 28, 28, 3), np.uint8).view(PromisedPixels)
    promised.room, promised.place, promised.soon = room, 7, 0.0
    late = request("late", [1, (2, b"p"), 2])
    seq = bench.add(late)
    seq.pixels[0] = promised
    bench.add(request("other", [1, 2]))
    assert [entry.seq.request_id for entry in bench.step().seqs] == ["other"]
    while len(bench.tokens("other")) < 4:
        bench.step()
    assert not bench.schedule()
    assert bench.scheduler.awaited is promised
    room[7] = 1
    assert bench.scheduler.awaited is None
    bench.run()
    assert bench.tokens("late") == expected(late, bench.limits)
    bench.idle()


@pytest.mark.parametrize("prefix", [True, False])
def test_openings_are_made_for_a_prefix_cache_only(prefix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = Sequence.opening, []

    def opening(seq: Sequence, index: int) -> Opening | None:
        made.append(index)
        return real(seq, index)

    monkeypatch.setattr(Sequence, "opening", opening)
    bench = Bench(prefix=prefix)
    asked = request("a", [1] * 10, SamplingParams(max_tokens=5, ignore_eos=True))
    bench.add(asked)
    bench.run()
    assert bench.tokens("a") == expected(asked, bench.limits)
    assert bool(made) == prefix
    bench.idle()
