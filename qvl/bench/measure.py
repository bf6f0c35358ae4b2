"""One engine against another in one process: the same prompts, the same threads, turns taken run by run.

Knows prompts, clocks and medians. Does not know what is measured: a `Subject` generates, this counts.
"""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and before the last of them at most one picture (uint8 [h, w, 3])."""

    token_ids: tuple[int, ...]
    picture: Pixels | None = None


class Subject(Protocol):
    """Something that generates greedily."""

    name: str

    def generate(self, prompt: Prompt, num_tokens: int) -> list[float]:
        """Seconds from the start to each of exactly `num_tokens` tokens, preprocessing included."""


@runtime_checkable
class Crowd(Protocol):
    """A subject that can answer several prompts at once."""

    def generate_together(self, prompts: Sequence[Prompt], num_tokens: int) -> list[float]:
        """Seconds of each step in which every prompt gained one token."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is measured: a text prompt, a picture of (height, width) with a short text, and `streams` text prompts at
    once where that is above 1, each `repeats` times.
    """

    prompt_tokens: int = 96
    output_tokens: int = 32
    picture: tuple[int, int] | None = (448, 448)
    repeats: int = 3
    seed: int = 0
    streams: int = 1


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians in seconds; `picture_ttft` is None where no picture was shown, `step_together` (one step of all streams)
    where there was one stream.
    """

    prefill: float
    time_per_token: float
    picture_ttft: float | None
    step_together: float | None = None


def measure(
    subjects: Sequence[Subject], workload: Workload, usable_ids: Sequence[int], tell: Callable[[str], None]
) -> dict[str, Figures]:
    """Figures by subject name. Each round asks every subject the same fresh prompts, so that no cache can help and what
    disturbs the machine disturbs all; an untimed round comes first.
    """
    rng = random.Random(workload.seed)
    first: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    later: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    shown: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    together: dict[str, list[float]] = {subject.name: [] for subject in subjects}
    for turn in range(workload.repeats + 1):
        text, picture = _prompts(workload, usable_ids, rng)
        crowd = [_prompts(workload, usable_ids, rng)[0] for _ in range(workload.streams)]
        for subject in subjects:
            tell(f"{'warm-up' if turn == 0 else f'round {turn} of {workload.repeats}'}: {subject.name}")
            times = subject.generate(text, workload.output_tokens)
            seen = subject.generate(picture, 1) if picture is not None else []
            if turn > 0:
                first[subject.name].append(times[0])
                later[subject.name] += [after - before for before, after in itertools.pairwise(times)]
                shown[subject.name] += seen
            if workload.streams > 1 and turn > 0 and isinstance(subject, Crowd):
                together[subject.name] += subject.generate_together(crowd, workload.output_tokens)
    return {s.name: _figures(first[s.name], later[s.name], shown[s.name], together[s.name]) for s in subjects}


def ratios(ours: Figures, theirs: Figures) -> Mapping[str, float | None]:
    """Our time as a part of theirs, figure by figure: below 1 is faster."""
    return {
        "prefill": ours.prefill / theirs.prefill,
        "time_per_token": ours.time_per_token / theirs.time_per_token,
        "picture_ttft": _ratio(ours.picture_ttft, theirs.picture_ttft),
        "step_together": _ratio(ours.step_together, theirs.step_together),
    }


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def _figures(first: list[float], later: list[float], shown: list[float], together: list[float]) -> Figures:
    return Figures(statistics.median(first), statistics.median(later), _median(shown), _median(together))


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _prompts(workload: Workload, usable_ids: Sequence[int], rng: random.Random) -> tuple[Prompt, Prompt | None]:
    """A fresh text prompt and a fresh picture prompt: random ids share no prefix, noise shares no encoding."""
    text = Prompt(tuple(rng.choices(usable_ids, k=workload.prompt_tokens)))
    if workload.picture is None:
        return text, None
    noise = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (*workload.picture, 3), dtype=np.uint8)
    return text, Prompt(tuple(rng.choices(usable_ids, k=16)), noise)
