"""The sampler against transformers' logits processors, against probabilities, and against itself in other company."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qvl.engine import noise
from qvl.engine.noise import gumbel, noise_keys
from qvl.engine.sampler import FAILED, Sampler, SamplerRow
from qvl.types import SamplingParams, TokenLogprob

VOCAB = 211
CPU = torch.device("cpu")


LINES = 10_000


def make_sampler(never: tuple[int, ...] = (), device: torch.device = CPU, vocab: int = VOCAB) -> Sampler:
    return Sampler(vocab, LINES, never_sampled=never, device=device)


def params(**changes: object) -> SamplingParams:
    neutral = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": 64}
    return SamplingParams(**(neutral | changes))  # type: ignore[arg-type]


def row(
    sampling: SamplingParams,
    seed: int = 0,
    prompt: tuple[int, ...] = (1, 2),
    output: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
) -> SamplerRow:
    """A row that will get its place and a line of its own in `draw`."""
    ids = [*prompt, *output]
    return SamplerRow(0, object(), 0, sampling, seed, banned, ids, len(prompt), len(ids))


@dataclass
class Found:
    token_id: int
    logprob: TokenLogprob | None

    @property
    def failed(self) -> bool:
        return self.token_id == FAILED


def draw(sampler: Sampler, logits: torch.Tensor, rows: list[SamplerRow], lines: list[int] | None = None) -> list[Found]:
    """What the sampler chooses when every row has rules; line i is row i's unless `lines` says otherwise."""
    lines = lines or list(range(len(rows)))
    placed = [replace(row, index=i, line=line) for i, (row, line) in enumerate(zip(rows, lines, strict=True))]
    before = logits.clone()
    tokens, logprobs = sampler.draw(logits, sampler.best(logits), placed).fetch().wait()
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the logits of others may be read again"
    return [Found(token, logprobs.get(i)) for i, token in enumerate(tokens)]


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_rows_take_the_first_maximum() -> None:
    logits = random_logits(5)
    logits[3, 7] = logits[3, 9] = 50.0
    want = logits.argmax(dim=1).tolist()
    assert want[3] == 7
    assert [token.token_id for token in draw(make_sampler(), logits, [row(params())] * 5)] == want


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 50, "top_p": 0.7, "min_p": 0.02},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_frequencies_are_the_probabilities_of_transformers_warpers(rules: dict[str, float]) -> None:
    logits = random_logits(1, seed=3)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(rules["temperature"]))])
    if "top_k" in rules:
        warpers.append(TopKLogitsWarper(int(rules["top_k"])))
    if "top_p" in rules:
        warpers.append(TopPLogitsWarper(rules["top_p"]))
    if "min_p" in rules:
        warpers.append(MinPLogitsWarper(rules["min_p"]))
    want = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone())[0].softmax(dim=0)
    draws = 8000
    sampled = draw(make_sampler(), logits.repeat(draws, 1), [row(params(**rules), seed=s) for s in range(draws)])
    counts = torch.zeros(VOCAB)
    for token in sampled:
        counts[token.token_id] += 1
    assert counts[want == 0].sum() == 0  # the filters leave out exactly what transformers leaves out
    likely = want * draws > 5
    chi2 = ((counts - want * draws) ** 2 / (want * draws))[likely].sum().item()
    freedom = int(likely.sum()) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_look_at_the_few_best_chooses_as_a_full_sort_does(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    """On a CPU the sort is spared where the few best cover top_p; flat and peaked rows alike."""
    rules: list[dict[str, float]] = [
        {"top_p": 0.5}, {"top_p": 0.9, "top_k": 5}, {"top_p": 0.99, "top_k": 40}, {"top_k": 200}, {"top_p": 1e-6},
        {"min_p": 0.05, "top_p": 0.8},
    ]  # fmt: skip
    for number in range(len(rules) + 1):
        chosen = rules[:number] or rules
        rows = [row(params(temperature=0.8, **rule), seed=s) for rule in chosen for s in range(40)]
        logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(number)) * spread
        found = []
        for few in (10**6, 16, 64):
            monkeypatch.setattr("qvl.engine.sampler.FEW_CANDIDATES", few)
            found.append([token.token_id for token in draw(make_sampler(), logits.clone(), rows)])
        assert found[0] == found[1] == found[2]


def test_rows_of_one_step_keep_filters_of_their_own() -> None:
    """Eight tokens as good as equal: whoever may choose among k of them chooses each of these, and no other."""
    seeds = range(120)
    rules = {1: {"top_k": 1}, 2: {"top_k": 2}, 3: {"top_p": 0.375}, 5: {"top_k": 5}, 7: {"top_p": 0.86}}
    rows = [row(params(temperature=1.0, **rule), seed=seed) for rule in rules.values() for seed in seeds]
    logits = torch.full((len(rows), VOCAB), -100.0)
    logits[:, 20:28] = torch.linspace(0.0, -1e-4, 8)
    chosen = [token.token_id for token in draw(make_sampler(), logits, rows)]
    for number, count in enumerate(rules):
        assert set(chosen[number * len(seeds) : (number + 1) * len(seeds)]) == set(range(20, 20 + count)), count


def test_what_reaches_top_p_or_min_p_exactly() -> None:
    halves = torch.full((1, VOCAB), -1e9)
    halves[0, 3] = halves[0, 4] = 0.0
    rows = [row(params(temperature=1.0, top_p=0.5), seed=seed) for seed in range(50)]
    assert len({token.token_id for token in draw(make_sampler(), halves.repeat(50, 1), rows)}) == 1
    best = random_logits(1, seed=4)
    for rules in ({"min_p": 1.0}, {"top_p": 1e-60}):  # the second is 0 in fp32
        rows = [row(params(temperature=1.0, **rules), seed=seed) for seed in range(50)]
        assert {token.token_id for token in draw(make_sampler(), best.repeat(50, 1), rows)} == {int(best.argmax())}


@pytest.mark.parametrize("bits", [0, -1, 2**31 - 1, -(2**31)])
def test_noise_is_a_number_at_the_ends_of_its_range(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(noise, "_mix32", lambda x: torch.full_like(x, bits))
    assert gumbel(torch.zeros(1, 2, dtype=torch.int32), torch.arange(4, dtype=torch.int32)[None]).isfinite().all()


def test_seeds_and_positions_are_not_the_same_thing() -> None:
    """A neighbour's seed one place further on is other noise: two streams never say the same thing shifted."""
    keys = noise_keys([seed for seed in range(20) for _ in range(20)], [*range(20)] * 20)
    assert len({tuple(key) for key in keys.tolist()}) == 400


def test_noise_is_uniform_in_every_direction() -> None:
    """Along token ids, along positions and along seeds: the exponentials behind the noise have mean and variance 1."""
    ids = torch.arange(2000, dtype=torch.int32)[None]
    keys = [noise_keys([s] * 50, range(50)) for s in (0, 1, 2**40)] + [noise_keys(range(-25, 25), [3] * 50)]
    for table in keys:
        waits = torch.exp(-gumbel(torch.from_numpy(table), ids)).double()
        assert abs(waits.mean().item() - 1) < 0.02
        assert abs(waits.var().item() - 1) < 0.06
        assert abs(torch.corrcoef(waits[:2])[0, 1].item()) < 0.1
        assert waits.unique().numel() > 0.99 * waits.numel()
    assert waits.min() > 0


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    logits = random_logits(6, seed=9)
    mine = params(temperature=1.0, top_p=0.9)
    alone = [draw(make_sampler(), logits[:1].clone(), [row(mine, 42, output=(5,) * n)])[0].token_id for n in range(20)]
    assert len(set(alone)) > 3  # the position matters
    others = [params(), params(temperature=2.0), params(temperature=1.0, top_k=3), params(temperature=0.5, min_p=0.3)]
    for n, want in enumerate(alone):
        rows = [row(rule, seed=n + i) for i, rule in enumerate(others)] + [row(mine, 42, output=(5,) * n)]
        batch = torch.cat([logits[1:5], logits[:1]])
        assert draw(make_sampler(), batch, rows)[-1].token_id == want
    seeds = {draw(make_sampler(), logits[:1].clone(), [row(mine, s)])[0].token_id for s in range(40)}
    assert len(seeds) > 3


def test_repetition_penalty_equals_transformers() -> None:
    logits = random_logits(2, seed=5)
    histories = [((3, 8, 8), (100, 3)), ((7,), ())]
    rows = [row(params(repetition_penalty=1.3, logprobs=0), prompt=p, output=o) for p, o in histories]
    for i, (prompt, output) in enumerate(histories):
        scores = logits[i : i + 1].clone()
        best = int(scores.argmax())
        scores[0, prompt[0]] = scores[0, best] * 1.2  # wins unless it is penalised
        oracle = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([[*prompt, *output]]), scores.clone())
        got = draw(make_sampler(), scores, [rows[i]])[0].token_id
        assert got == int(oracle.argmax()) == best


def test_presence_and_frequency_read_the_output_only() -> None:
    base = torch.full((1, VOCAB), -5.0)
    base[0, 10], base[0, 11], base[0, 12] = 3.0, 2.9, 2.0

    def best(rule: SamplingParams, prompt: tuple[int, ...], output: tuple[int, ...]) -> int:
        return draw(make_sampler(), base.clone(), [row(rule, prompt=prompt, output=output)])[0].token_id

    presence, frequency = params(presence_penalty=0.5), params(frequency_penalty=0.5)
    assert best(presence, prompt=(10, 11), output=()) == 10
    assert best(presence, prompt=(1,), output=(10,)) == 11
    assert best(presence, prompt=(1,), output=(10, 11, 11)) == 10  # once is as much as twice
    assert best(frequency, prompt=(1,), output=(10, 11, 11)) == 10
    assert best(frequency, prompt=(1,), output=(10, 10, 10, 11, 11)) == 12


@pytest.mark.parametrize("ahead", [False, True])
def test_penalty_counts_follow_requests_that_come_and_go(ahead: bool) -> None:
    """Counts are kept where they are used: the choice is that of counts made afresh, whatever joins, pauses, returns or
    takes over a line, and (`ahead`) when the host does not know the last token of those who were there before.
    """
    generator = torch.Generator().manual_seed(0)
    sampler = make_sampler()
    rule = params(frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.1)
    requests = [(object(), [i + 1, 50, 51]) for i in range(7)]
    before: set[object] = set()
    for step in range(60):
        lines = [i for i in range(7) if torch.rand((), generator=generator) < 0.6] or [0]
        logits = torch.randn(len(lines), VOCAB, generator=generator)
        rows = [SamplerRow(0, requests[i][0], 0, rule, 0, (), requests[i][1], 3, len(requests[i][1])) for i in lines]
        want = [draw(make_sampler(), logits[i : i + 1].clone(), [r])[0].token_id for i, r in enumerate(rows)]
        known = [r.token_ids[:-1] if ahead and r.owner in before else r.token_ids for r in rows]
        asked = [replace(r, token_ids=ids) for r, ids in zip(rows, known, strict=True)]
        assert [token.token_id for token in draw(sampler, logits, asked, lines)] == want, step
        for i, token in zip(lines, want, strict=True):
            requests[i][1].append(token)
        before |= {row.owner for row in rows}
        if step % 5 == 4:
            requests[step % 7] = (object(), [step, 50, step + 1])


def test_a_history_that_was_lost_is_counted_again() -> None:
    sampler = make_sampler()
    rule, owner = params(repetition_penalty=5.0), object()
    ids = [1, 2, 3]
    logits = torch.zeros(1, VOCAB)
    logits[0, :4] = torch.tensor([2.0, 9.0, 8.0, 7.0])
    for step in range(3):
        line = step % 2  # as after a preemption: the line of before is another's now
        mine = SamplerRow(0, owner, 0, rule, 0, (), list(ids), 3, len(ids))
        assert draw(sampler, logits.clone(), [mine], [line])[0].token_id == 0  # 2 is more than 9 / 5
        ids += [1, 1]


def test_bans_hold_whatever_the_bias_says() -> None:
    sampler = make_sampler(never=(20, 21))
    logits = torch.zeros(1, VOCAB)
    logits[0, 20] = 90.0
    biased = params(logit_bias={21: 100.0, 40: 5.0, VOCAB + 3: 100.0}, temperature=1.0, seed=1)
    tokens = draw(sampler, logits.repeat(300, 1), [row(biased, seed=s) for s in range(300)])
    chosen = {token.token_id for token in tokens}
    assert not chosen & {20, 21}
    assert 40 in chosen


def test_banned_ids_of_one_row_stay_free_in_another() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 30], logits[:, 31], logits[:, 32] = 9.0, 8.0, 1.0
    first, second = draw(make_sampler(), logits, [row(params(), banned=(30, 31, VOCAB)), row(params())])
    assert (first.token_id, second.token_id) == (32, 30)


def test_logprobs_are_those_of_the_raw_distribution() -> None:
    logits = random_logits(3, seed=4)
    want = logits.log_softmax(dim=1)
    best = logits.argmax(dim=1).tolist()
    bias = params(logit_bias={best[0]: -100.0}, logprobs=3, temperature=0.1, top_k=1)
    rows = [row(bias), row(params()), row(params(logprobs=0, temperature=2.0), seed=5)]
    first, second, third = draw(make_sampler(), logits, rows)
    assert second.logprob is None
    assert first.logprob is not None
    assert third.logprob is not None
    assert first.token_id != best[0]
    values, ids = want[0].topk(3)
    assert [pair[0] for pair in first.logprob.top] == ids.tolist()
    assert [pair[1] for pair in first.logprob.top] == pytest.approx(values.tolist(), rel=1e-6)
    assert first.logprob.logprob == pytest.approx(want[0, first.token_id].item(), rel=1e-6)
    assert third.logprob.top == ()
    assert third.logprob.token_id == third.token_id


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_numbers_fails_alone(bad: float) -> None:
    logits = random_logits(4)
    rules = [params(), params(logprobs=2), params(temperature=1.0, top_p=0.5), params(temperature=1.0, seed=3)]
    rows = [row(rule, seed=i) for i, rule in enumerate(rules)]
    want = [token.token_id for token in draw(make_sampler(), logits.clone(), rows)]
    for broken in range(4):
        hurt = logits.clone()
        hurt[broken, 17] = bad
        got = draw(make_sampler(), hurt, rows)
        assert [token.failed for token in got] == [i == broken for i in range(4)]
        assert [token.token_id for token in got if not token.failed] == [w for i, w in enumerate(want) if i != broken]
        assert got[broken].logprob is None
