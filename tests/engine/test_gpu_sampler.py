"""The sampler's kernels against brute force in float64: on a GPU where there is one, else in Triton's interpreter in a
process of its own, as in tests/kernels/on_gpu/test_triton.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qvl.engine import gpu_sampler
from qvl.engine.gpu_sampler import NEUTRAL, GpuSampler, make_sampler
from qvl.engine.grammar import token_words
from qvl.engine.noise import gumbel, noise_keys
from qvl.engine.sampler import FAILED, Sampler, SamplerRow
from qvl.types import SamplingParams
from tests.kernels.interpreted import DEVICE, INTERPRETED, ON_GPU, here, run_in_the_interpreter

pytestmark: Any = pytest.mark.gpu if ON_GPU else []

VOCAB = 9_001  # three parts, of which the last is not full
NEVER = (31, 32, 700, VOCAB - 1)
HISTORY = [1, 2, 3, 2, 9, 9, 9, 4000]  # three of the prompt
CLOSE = 1e-4


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests of this file run here")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def kernels_sampler(vocab: int = VOCAB) -> GpuSampler:
    from qvl.kernels.on_gpu import sampling

    if INTERPRETED:  # where every operation takes as long however many numbers it works on
        sampling.AT_A_TIME = 4096
    return GpuSampler(vocab, 64, NEVER if vocab == VOCAB else (), DEVICE, sampling)


def row(
    params: SamplingParams, seed: int = 0, banned: tuple[int, ...] = (), allowed: range | None = None
) -> SamplerRow:
    words = None if allowed is None else token_words(allowed, -(-VOCAB // 32))
    return SamplerRow(0, object(), 0, params, seed, banned, list(HISTORY), 3, len(HISTORY), words)


def choose(sampler: Sampler, logits: torch.Tensor, rows: list[SamplerRow]) -> list[int]:
    """Row i of the logits by the rules of rows[i]; its counts are kept somewhere else."""
    placed = [replace(row, index=i, line=len(rows) - 1 - i) for i, row in enumerate(rows)]
    logits = logits.to(sampler.device)
    before = logits.clone()
    tokens, _ = sampler.draw(logits, sampler.best(logits), placed).fetch().wait()
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0)), "the logits of others may be read again"
    return tokens


def scores_of(logits: torch.Tensor, row: SamplerRow) -> npt.NDArray[np.float64]:
    """After penalties, bias and bans."""
    x = logits.double().numpy().copy()
    rules, prompt = row.sampling, row.num_prompt_tokens
    repetition = rules.repetition_penalty or 1.0
    for token in set(row.token_ids):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(row.token_ids[prompt:]):
        x[token] -= rules.presence_penalty + rules.frequency_penalty * list(row.token_ids[prompt:]).count(token)
    for token, bias in rules.logit_bias.items():
        if token < len(x):
            x[token] += bias
    x[[*NEVER, *row.banned]] = -np.inf
    if row.allowed is not None:
        x[np.unpackbits(row.allowed.view(np.uint8), bitorder="little", count=len(x)) == 0] = -np.inf
    return x


def kept_of(x: npt.NDArray[np.float64], rules: SamplingParams, slack: float) -> npt.NDArray[np.int64]:
    """Ids that the filters leave, best first, the smaller id first among equals; with `slack`, what they almost do."""
    assert rules.temperature and rules.top_p
    order: npt.NDArray[np.int64] = np.argsort(-x, kind="stable")
    order = order[x[order] > -np.inf][: rules.top_k or None]
    weights = np.exp((x[order] - x[order[0]]) / rules.temperature)
    before = (np.cumsum(weights) - weights) / weights.sum()
    kept = (before < rules.top_p + slack) | (rules.top_p == 1.0) | (np.arange(len(order)) == 0)
    found: npt.NDArray[np.int64] = order[kept & (weights >= min(1.0, (rules.min_p or 0.0) * (1.0 - slack)))]
    return found


def assert_right(token: int, logits: torch.Tensor, row: SamplerRow) -> None:
    """It is kept, and no other that is kept is better by more than rounding."""
    rules, x = row.sampling, scores_of(logits, row)
    if not rules.temperature:
        assert token == int(np.argmax(x)) or x[token] > x.max() - CLOSE
        return
    keys = torch.from_numpy(noise_keys([row.seed], [row.position]))
    noise = gumbel(keys, torch.arange(len(x), dtype=torch.int32)[None])[0].double().numpy()
    noisy = x / rules.temperature + noise
    sure, almost = kept_of(x, rules, -1e-6), kept_of(x, rules, 1e-6)
    assert token in almost
    assert noisy[token] >= noisy[sure].max() - CLOSE


HOT = replace(NEUTRAL, temperature=1.3)
RULES = {
    "temperature": [row(replace(NEUTRAL, temperature=t), s) for s, t in enumerate((0.2, 1.0, 3.0))],
    "top_k": [row(replace(HOT, top_k=k), k) for k in (2, 1500, VOCAB - 1, VOCAB + 7)],
    "top_p": [row(replace(HOT, top_p=p), 7) for p in (1e-30, 0.5, 0.9, 0.9999999)],
    "both": [row(replace(HOT, top_k=k, top_p=p), k) for k, p in ((40, 0.9), (2000, 0.99), (6000, 0.3))],
    "min_p": [row(replace(HOT, min_p=m, top_p=p), 3) for m, p in ((1.0, 1.0), (0.3, 1.0), (0.01, 0.9))],
    "penalties": [
        row(replace(HOT, temperature=t, repetition_penalty=r, presence_penalty=0.7, frequency_penalty=f, top_k=9))
        for t, r, f in ((0.0, 1.5, 0.0), (0.8, 1.0, 0.4), (1.0, 0.5, -1.0))
    ],
    "bias and bans": [
        row(replace(HOT, top_k=5, logit_bias={4100: 30.0, 8: 29.0, VOCAB + 9: 50.0}), 1, banned=(8, VOCAB + 4)),
        row(replace(HOT, temperature=0.0, logit_bias={31: 99.0, 4: 50.0, 5: 49.0}), banned=(4,)),
        row(replace(HOT, top_p=0.6, logit_bias={2: 3.0}), allowed=range(0, VOCAB, 7)),
        row(HOT, 5, allowed=range(4096, 4099)),
        row(replace(HOT, temperature=0.0), allowed=range(31, 34)),
    ],
}


@here
@pytest.mark.parametrize("kind", RULES)
def test_choices_are_those_of_brute_force(kind: str) -> None:
    rows = [replace(row, banned=tuple(b for b in row.banned if b < VOCAB)) for row in RULES[kind]]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(len(kind)))
    logits[::2] *= 4.0  # some rows flat, some peaked
    for line, row, token in zip(logits, rows, choose(kernels_sampler(), logits, RULES[kind]), strict=True):
        assert_right(token, line, row)


@here
def test_ties_are_cut_by_token_id() -> None:
    """Few different scores, so that every threshold falls among equals; and all alike, which no list takes."""
    rules = [{"top_k": 700}, {"top_p": 0.4}, {"top_k": 900, "top_p": 0.5}, {"top_p": 0.01}, {"top_k": 2}]
    rows = [row(replace(HOT, **rule), seed) for seed, rule in enumerate(rules)]  # type: ignore[arg-type]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(0)).round()
    logits[-2:] = 0.0
    for line, one, token in zip(logits, rows, choose(kernels_sampler(), logits, rows), strict=True):
        assert_right(token, line, one)
    cut = [row(replace(HOT, top_k=2), seed) for seed in range(6)]
    same = torch.full((6, VOCAB), -9.0)
    same[:, [50, 4500, 8000]] = 1.0
    assert set(choose(kernels_sampler(), same, cut)) == {50, 4500}


@here
def test_a_row_that_is_not_numbers_fails_alone() -> None:
    rules = [{}, {"top_p": 0.5}, {"temperature": 0.0, "repetition_penalty": 2.0}, {"top_k": 3}]
    rows = [row(replace(NEUTRAL, **rule)) for rule in rules]  # type: ignore[arg-type]
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    logits[0, 6000], logits[1, 3], logits[2, 31] = torch.nan, torch.inf, -torch.inf
    *failed, healthy = choose(kernels_sampler(), logits, rows)
    assert failed == [FAILED] * 3
    assert_right(healthy, logits[3], rows[3])


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_best_of_every_row(dtype: torch.dtype) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2)).to(dtype)
    logits[0, [31, 8000]] = 50.0  # the first is never sampled
    logits[1, [300, 4099]] = 50.0
    logits[2] = -60000.0
    logits[3, VOCAB - 1] = torch.nan  # in what is never sampled, too
    plain = Sampler(VOCAB, 1, never_sampled=NEVER, device=torch.device("cpu"))
    want = plain.best(logits).tolist()
    assert want[:4] == [8000, 300, 0, FAILED]
    assert kernels_sampler().best(logits.to(DEVICE)).tolist() == want


@here
def test_a_row_gives_the_same_token_in_any_company_and_as_without_kernels() -> None:
    sampler, plain = kernels_sampler(), Sampler(VOCAB, 64, never_sampled=NEVER, device=torch.device("cpu"))
    rows = [members[1] for members in RULES.values()]
    rows = [replace(row, banned=tuple(b for b in row.banned if b < VOCAB)) for row in rows]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    together = choose(sampler, logits, rows)
    assert together == choose(plain, logits, rows)
    for i in (2, 3):
        assert choose(sampler, logits[i : i + 1], rows[i : i + 1]) == together[i : i + 1]


@here
def test_tokens_are_counted_where_they_are_chosen() -> None:
    """Every token costs its repetition: the answer is a list of the best, each once, though the host tells of none."""
    sampler, owner = kernels_sampler(), object()
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    logits[0, list(NEVER)] = -9.0
    rules, said = replace(NEUTRAL, temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0), []
    for length in range(3, 8):
        one = SamplerRow(0, owner, 5, rules, 0, (), [1, 2, 3], 3, length)
        said += sampler.draw(logits, sampler.best(logits), [one]).fetch().wait()[0]
    assert said == logits[0].topk(5).indices.tolist()


@here
def test_a_line_follows_its_owner() -> None:
    """The rules of a line are kept while its owner is the same, and no longer."""
    sampler = kernels_sampler(300)
    logits = torch.linspace(0.0, 1.0, 300, device=DEVICE)[None]
    for rules, want in ((replace(NEUTRAL, top_p=1e-9), {299}), (NEUTRAL, None), (replace(NEUTRAL, min_p=1.0), {299})):
        owner = object()
        said = set()
        for length in range(2, 5 if want else 8):  # where every draw is the same, the line is written, kept, and kept
            one = SamplerRow(0, owner, 1, rules, 3, (), [0] * length, 1, length)
            said |= set(sampler.draw(logits, sampler.best(logits), [one]).fetch().wait()[0])
        assert said == want if want else len(said) > 3


@here
def test_kernels_that_choose_otherwise_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.kernels.on_gpu import sampling

    assert gpu_sampler.problem_of(sampling, 300, (5,), DEVICE, torch.float32) is None
    monkeypatch.setattr(GpuSampler, "_with_exceptions", lambda self, rows, words: words)
    assert "instead of" in str(gpu_sampler.problem_of(sampling, 300, (5,), DEVICE, torch.float32))


def test_without_a_gpu_torch_chooses() -> None:
    assert type(make_sampler(VOCAB, 2, NEVER, torch.device("cpu"), torch.float32)) is Sampler
