"""The sampler with kernels of its own: all rules of all rows in a few launches, nothing sorted, one copy to the device.

Knows how to lay out rules (`qvl.kernels.rules`), and to try the kernels out before they are trusted. Does not know what
they compute: that is `Sampler`'s word, which takes over where they cannot run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.grammar import token_words
from qvl.engine.noise import noise_keys
from qvl.engine.sampler import Drawn, Sampler, SamplerRow, kind_of, scale_of, top_k_of
from qvl.engine.sequence import wants_penalties
from qvl.engine.transfer import put
from qvl.kernels import rules
from qvl.kernels.gpu import compiling_together, gpu_problem, tried_out
from qvl.types import SamplingParams

COST = "torch's own operations choose the tokens instead: milliseconds a step while requests have rules of sampling"
KINDS = {"greedy": rules.GREEDY, "free": rules.FREE, "few": rules.FILTERED, "many": rules.FILTERED}


def make_sampler(
    vocab_size: int, num_lines: int, never_sampled: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Sampler:
    """With kernels where they run, otherwise with torch's operations."""
    kernels = sampling_kernels(vocab_size, never_sampled, device, dtype)
    if kernels is None:
        return Sampler(vocab_size, num_lines, never_sampled=never_sampled, device=device)
    return GpuSampler(vocab_size, num_lines, never_sampled, device, kernels)


@functools.cache
def sampling_kernels(
    vocab_size: int, never_sampled: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> ModuleType | None:
    """`qvl.kernels.on_gpu.sampling` on a GPU where it builds and chooses as torch's operations do on the host.

    Tried out once; warns when it should run and does not.
    """
    if device.type != "cuda" or gpu_problem() is not None:
        return None

    def trial(kernels: Any) -> str | None:
        return problem_of(kernels, vocab_size, never_sampled, device, dtype)

    return tried_out("sampling", "the kernels that choose tokens", trial, COST)


class GpuSampler(Sampler):
    """Keeps the rules of every line as a kernel reads them; they change with the line's owner only."""

    def __init__(
        self, vocab_size: int, num_lines: int, never: tuple[int, ...], device: torch.device, kernels: ModuleType
    ) -> None:
        super().__init__(vocab_size, num_lines, never_sampled=never, device=device)
        self._kernels = kernels
        self._allowed = put(~token_words(never, -(-vocab_size // 32)), device)
        self._no_counts = torch.zeros(16, dtype=torch.int16, device=device)
        self._scratch: Any = None
        self._owners: list[object] = [None] * num_lines
        self._words = np.zeros((num_lines, rules.FIELDS), dtype=np.int32)
        self._filters = np.zeros((num_lines, 2), dtype=np.bool_)  # whether any; whether top_k or top_p
        self._seeds = np.zeros(num_lines, dtype=np.int64)

    def best(self, logits: Tensor) -> Tensor:
        tokens: Tensor = self._kernels.best(logits.contiguous(), self._allowed)
        return tokens

    def draw(self, logits: Tensor, best: Tensor, rows: Sequence[SamplerRow]) -> Drawn:
        if not rows:
            return Drawn(best)
        drawn = Drawn(best.clone())
        penalised = [row for row in rows if wants_penalties(row.sampling)]
        for row in penalised:
            self.counts.prepare(row)
        if self._scratch is None or self._scratch.rows < len(rows):
            self._scratch = self._kernels.Scratch.create(len(rows), self.vocab_size, self.device)
        laid_out = self._rules(rows, bool(penalised))
        self._kernels.choose(logits.contiguous(), self._allowed, laid_out, self._scratch, best, drawn.tokens)
        self.counts.were_counted(penalised)
        self.tell_logprobs(logits, rows, drawn)
        return drawn

    def _rules(self, rows: Sequence[SamplerRow], penalised: bool) -> rules.Rules:
        lines = [row.line for row in rows]
        for row in rows:
            if self._owners[row.line] is not row.owner:
                self._learn(row)
        words = self._words[lines]
        words[:, rules.INDEX] = [row.index for row in rows]
        positions = [row.num_tokens - row.num_prompt_tokens for row in rows]
        words[:, rules.KEY : rules.KEY + 2] = noise_keys(self._seeds[lines], positions)
        filters = self._filters[lines]
        return rules.Rules(
            words=put(self._with_exceptions(rows, words), self.device),
            rows=len(rows),
            counts=self.counts.table if penalised else self._no_counts,
            filters=bool(filters[:, 0].any()),
            narrows=bool(filters[:, 1].any()),
        )

    def _learn(self, row: SamplerRow) -> None:
        """What stays the same as long as the line has this owner."""
        sampling, words = row.sampling, self._words[row.line]
        kind = KINDS[kind_of(sampling, self.vocab_size)]
        words[rules.KIND] = rules.FILTERED if kind == rules.FREE and sampling.min_p else kind
        words[rules.LINE] = row.line if wants_penalties(sampling) else -1
        words[rules.MASK] = -1
        top_k = top_k_of(sampling, self.vocab_size)
        words[rules.TOP_K] = top_k if top_k < self.vocab_size else 0
        words.view(np.float32)[rules.SCALE :] = [
            scale_of(sampling),
            1.0 if sampling.top_p is None else sampling.top_p,
            math.log(sampling.min_p) if sampling.min_p else -math.inf,
            sampling.repetition_penalty or 1.0,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            0.0,
        ]
        narrows = top_k < self.vocab_size or (sampling.top_p or 1.0) < 1.0
        self._filters[row.line] = words[rules.KIND] == rules.FILTERED
        self._filters[row.line, 1] &= narrows
        self._seeds[row.line] = row.seed
        self._owners[row.line] = row.owner

    def _with_exceptions(self, rows: Sequence[SamplerRow], words: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """`words`, then items and masks of the rows that have some, end to end; their places go into `words`."""
        tokens: list[int] = []
        added: list[float] = []
        masked: list[int] = []
        for i, row in enumerate(rows):
            if row.sampling.logit_bias or row.banned:
                found = [*row.sampling.logit_bias.items(), *((token, -math.inf) for token in row.banned)]
                words[i, rules.ITEMS] = words.size + 2 * len(tokens)
                words[i, rules.NUM_ITEMS] = len(found)
                tokens += [token for token, _ in found]
                added += [value for _, value in found]
            if row.allowed is not None:
                masked.append(i)
        if not tokens and not masked:
            return words
        items = np.zeros((len(tokens), 2), dtype=np.int32)
        items[:, 0] = tokens
        items.view(np.float32)[:, 1] = added
        masks = [mask for i in masked if (mask := rows[i].allowed) is not None]
        words[masked, rules.MASK] = words.size + items.size + np.arange(len(masked)) * -(-self.vocab_size // 32)
        return np.concatenate([words.reshape(-1), items.reshape(-1), *masks])


NEUTRAL = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
TRIED = [
    NEUTRAL,
    replace(NEUTRAL, temperature=0.7, top_k=20),
    replace(NEUTRAL, temperature=1.2, top_p=0.9),
    replace(NEUTRAL, top_k=30, top_p=0.8, min_p=0.02),
    replace(NEUTRAL, temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
    replace(NEUTRAL, min_p=0.1, logit_bias={3: 40.0, 4: -1.0}),
    NEUTRAL,
]


def problem_of(
    kernels: ModuleType, vocab_size: int, never: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What is wrong with what they choose by the rules of TRIED, or None; also compiles them, all at the same time."""
    cpu = torch.device("cpu")
    sampler = GpuSampler(vocab_size, len(TRIED), never, device, kernels)
    reference = Sampler(vocab_size, len(TRIED), never_sampled=never, device=cpu)
    numbers = torch.Generator().manual_seed(0)
    scores = torch.randn(len(TRIED), vocab_size, generator=numbers)
    # A few dozen stand out, no two of them alike in 16 bits: what is kept does not hang on the rounding of sums.
    few = min(64, vocab_size)
    for line in scores:
        line[torch.randperm(vocab_size, generator=numbers)[:few]] = torch.arange(few) * 0.25 + 8.0
    scores[-1, 0] = torch.nan
    scores = scores.to(dtype)
    with compiling_together():
        choose_once(sampler, scores.to(device))
    chosen, wanted = choose_once(sampler, scores.to(device)), choose_once(reference, scores)
    return None if chosen == wanted else f"those that choose tokens chose {chosen} instead of {wanted}"


def choose_once(sampler: Sampler, logits: Tensor) -> list[int]:
    """One token of every row, by the rules of TRIED."""
    rows = [SamplerRow(i, object(), i, params, i, (2,), [1, 2, 3], 2, 3) for i, params in enumerate(TRIED)]
    return sampler.draw(logits, sampler.best(logits), rows).fetch().wait()[0]
