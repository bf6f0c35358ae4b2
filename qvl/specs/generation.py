"""The checkpoint's own sampling values, and how they fill what a request leaves open.

Knows the trap in Qwen2-VL's generation_config: its `top_k` 1 and `top_p` 0.001 are greedy decoding in disguise, so that
a request's temperature would seem to do nothing. Does not know how tokens are chosen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from qvl.types import SamplingParams

_GREEDY_TOP_P = 0.05  # a nucleus this small keeps one token nearly always


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """generation_config.json, neutral where it is silent (`top_k` 0: no limit); `do_sample: false` is temperature 0."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def fill(self, sampling: SamplingParams, max_tokens_default: int) -> SamplingParams:
        """`sampling` with every open value filled (`logprobs` and `seed` may stay None).

        A request's own values always win. When it sets `temperature` or `top_p` itself, values of the checkpoint that
        would make the choice greedy all the same (`top_k` 1, a tiny `top_p`) are dropped. Raises `InvalidRequest` when
        the result contradicts itself (`min_tokens` above the default `max_tokens`).
        """
        chooses = sampling.temperature is not None or sampling.top_p is not None
        top_k = 0 if chooses and self.top_k == 1 else self.top_k
        top_p = 1.0 if chooses and self.top_p < _GREEDY_TOP_P else self.top_p
        return dataclasses.replace(
            sampling,
            max_tokens=max_tokens_default if sampling.max_tokens is None else sampling.max_tokens,
            temperature=self.temperature if sampling.temperature is None else sampling.temperature,
            top_p=top_p if sampling.top_p is None else sampling.top_p,
            top_k=top_k if sampling.top_k is None else sampling.top_k,
            min_p=self.min_p if sampling.min_p is None else sampling.min_p,
            repetition_penalty=(
                self.repetition_penalty if sampling.repetition_penalty is None else sampling.repetition_penalty
            ),
        )
