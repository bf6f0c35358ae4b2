"""Servers beside each other: the same loads, turn by turn, and the medians of the turns.

Knows turns, medians and ratios. Does not know what runs behind an address: all are asked by the same client.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qvl.bench.load.cases import Load
from qvl.bench.load.figures import Figures, Spread
from qvl.bench.load.worker import Target
from qvl.errors import ConfigError, RequestFailed

# Seconds between one server's turn and the next: threads of vLLM's go on spinning on every core for a second after an
# answer, which made the first token of who came next take 1.7 times as long.
REST = 2.0
Run = Callable[[Target, Load], Figures]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is asked in every round: one text, one picture of (width, height) with a short text, `streams` texts at
    once. A picture of None and streams of 1 leave theirs out.
    """

    input_tokens: int = 96
    output_tokens: int = 32
    picture: tuple[int, int] | None = (448, 448)
    streams: int = 8
    rounds: int = 3

    def loads(self, seed: int) -> dict[str, Load]:
        """By name. Another seed asks for the same amount of work with other texts and pictures."""
        text = Load("text", 1, 1, None, self.input_tokens, self.output_tokens, pictures=0, seed=seed)
        loads = {"text": text}
        if self.picture is not None:
            width, height = self.picture
            loads["picture"] = Load("picture", 1, 1, None, 16, 1, pictures=1, width=width, height=height, seed=seed)
        if self.streams > 1:
            loads["streams"] = dataclasses.replace(
                text, name="streams", requests=self.streams, concurrency=self.streams
            )
        return loads


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of one server: milliseconds to the first token and per token after it, tokens a second of all streams."""

    text_ttft_ms: float
    tpot_ms: float
    picture_ttft_ms: float | None
    streams_tok_s: float | None
    prompt_tokens: float
    picture_prompt_tokens: float | None


def compare(
    targets: Mapping[str, Target],
    comparison: Comparison,
    seed: int,
    run: Run,
    tell: Callable[[str], None],
    rest: Callable[[float], None] = time.sleep,
) -> dict[str, Measured]:
    """Every round asks every server the same fresh prompts, each in turn alone and after a rest; a round that does not
    count comes first, and every other round goes the other way about. Raises `RequestFailed` when a request fails.
    """
    seen: dict[str, list[dict[str, Figures]]] = {name: [] for name in targets}
    for turn in range(comparison.rounds + 1):
        loads = comparison.loads(seed + turn)
        order = list(targets)[:: -1 if turn % 2 else 1]
        for name in order:
            tell(f"{'warm-up' if turn == 0 else f'round {turn} of {comparison.rounds}'}: {name}")
            rest(REST)
            figures = {case: _answered(name, run(targets[name], load)) for case, load in loads.items()}
            if turn > 0:
                seen[name].append(figures)
    return {name: _median(rounds) for name, rounds in seen.items()}


def read_target(text: str) -> tuple[str, str]:
    """ "vllm=http://127.0.0.1:9000" -> name and address. Raises `ConfigError`."""
    name, _, url = text.partition("=")
    if not name or not url.startswith(("http://", "https://")):
        raise ConfigError(f"a server is named as in vllm=http://127.0.0.1:9000, not '{text}'")
    return name, url


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours as a part of theirs; None where either was not measured."""
    return None if ours is None or not theirs else ours / theirs


def _answered(name: str, figures: Figures) -> Figures:
    if figures.errors:
        raise RequestFailed(f"{name}: a request of '{figures.load.name}' failed: {figures.first_error}")
    if figures.tpot_ms is None and figures.load.output_tokens > 1:
        raise RequestFailed(f"{name}: every answer came in one piece, which says nothing about the time per token")
    return figures


def _median(rounds: Sequence[Mapping[str, Figures]]) -> Measured:
    def middle(case: str, read: Callable[[Figures], float]) -> float:
        return statistics.median(read(one[case]) for one in rounds)

    picture, streams = "picture" in rounds[0], "streams" in rounds[0]
    return Measured(
        middle("text", lambda figures: _p50(figures.ttft_ms)),
        middle("text", lambda figures: _p50(figures.tpot_ms)),
        middle("picture", lambda figures: _p50(figures.ttft_ms)) if picture else None,
        middle("streams", lambda figures: figures.out_tok_s) if streams else None,
        middle("text", lambda figures: figures.prompt_tokens),
        middle("picture", lambda figures: figures.prompt_tokens) if picture else None,
    )


def _p50(spread: Spread | None) -> float:
    assert spread is not None  # a run without answers was refused
    return spread.p50
