"""From what happened to every request to the figures of a run, and the lines of the table. Knows arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qvl.bench.load.answer import Outcome
from qvl.bench.load.cases import Load

MILLI = 1000.0
# Above this part of a core, the busiest client process rather than the server may be what was measured.
BUSY = 0.85


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds over all requests that were answered."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """None where there is nothing to rank. A percentile is a value that occurred: rank floor(p * n) from 0."""
        if not seconds:
            return None
        ranked = sorted(seconds)
        at = [ranked[min(len(ranked) - 1, int(p * len(ranked)))] for p in (0.5, 0.9, 0.99)]
        mean = sum(ranked) / len(ranked)
        return cls(*(round(MILLI * value, 3) for value in (mean, *at, ranked[-1])))


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. `ttft_ms`: to the first token; `tpot_ms`: per token after it, one value a request; `itl_ms`:
    between one piece of text and the next, one value a piece; `e2e_ms`: to the end. Rates count answered requests only,
    over `wall_s`. `short_answers`: answers with fewer tokens than asked for; `whole_answers`: of which nothing was seen
    before their end; `client_cpu`: how much of a core the busiest client process took.
    """

    load: Load
    requests: int
    errors: int
    first_error: str | None
    wall_s: float
    req_s: float
    out_tok_s: float
    in_tok_s: float
    prompt_tokens: float
    output_tokens: float
    short_answers: int
    whole_answers: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    chunks_s: float
    processes: int
    client_cpu: float

    @property
    def doubts(self) -> list[str]:
        """What a reader must know before using the figures."""
        found = []
        if self.errors:
            found.append(f"{self.errors} of {self.requests} requests failed, the first with: {self.first_error}")
        if self.short_answers:
            found.append(f"{self.short_answers} answers had fewer than {self.load.output_tokens} tokens")
        if self.whole_answers:
            found.append(f"{self.whole_answers} answers came in one piece: their TTFT is the time of the whole answer")
        if self.client_cpu > BUSY:
            found.append(f"a client process took {self.client_cpu:.0%} of a core: more --processes may show more")
        return found


def summarise(load: Load, outcomes: Sequence[Outcome], *, wall: float, processes: int, client_cpu: float) -> Figures:
    """The figures of a run of `wall` seconds."""
    good = [outcome for outcome in outcomes if not outcome.error]
    bad = sorted((outcome for outcome in outcomes if outcome.error), key=lambda outcome: outcome.start)
    prompt, output = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
    return Figures(
        load=load,
        requests=len(outcomes),
        errors=len(bad),
        first_error=bad[0].error if bad else None,
        wall_s=round(wall, 3),
        req_s=round(len(good) / wall, 3),
        out_tok_s=round(output / wall, 1),
        in_tok_s=round(prompt / wall, 1),
        prompt_tokens=round(prompt / max(1, len(good)), 1),
        output_tokens=round(output / max(1, len(good)), 1),
        short_answers=sum(o.output_tokens < load.output_tokens for o in good),
        whole_answers=sum(o.is_one_piece and o.output_tokens > 1 for o in good),
        ttft_ms=Spread.of([o.ttft for o in good]),
        tpot_ms=Spread.of([o.tpot for o in good if o.tpot is not None]),
        itl_ms=Spread.of([gap for o in good for gap in o.gaps]),
        e2e_ms=Spread.of([o.e2e for o in good]),
        chunks_s=round(sum(o.chunks for o in good) / wall, 1),
        processes=processes,
        client_cpu=round(client_cpu, 3),
    )


_COLUMNS = (
    ("case", 22),
    ("load", 8),
    ("requests", 9),
    ("failed", 7),
    ("req/s", 9),
    ("out tok/s", 10),
    ("tok in+out", 12),
    ("TTFT p50", 10),
    ("p90", 9),
    ("p99", 9),
    ("TPOT p50", 9),
    ("p99", 8),
    ("E2E p50", 10),
    ("p99", 10),
)


def table_head() -> str:
    """The line above the table; times are milliseconds."""
    return _line([name for name, _ in _COLUMNS])


def table_row(figures: Figures) -> str:
    """One run as a line."""
    load = figures.load
    ttft, tpot, e2e = figures.ttft_ms, figures.tpot_ms, figures.e2e_ms
    return _line(
        [
            load.name,
            load.label,
            str(figures.requests),
            str(figures.errors),
            f"{figures.req_s:.2f}",
            f"{figures.out_tok_s:.0f}",
            f"{figures.prompt_tokens:.0f}+{figures.output_tokens:.0f}",
            *(f"{ttft.p50:.1f} {ttft.p90:.1f} {ttft.p99:.1f}" if ttft else "- - -").split(),
            *(f"{tpot.p50:.2f} {tpot.p99:.2f}" if tpot else "- -").split(),
            *(f"{e2e.p50:.0f} {e2e.p99:.0f}" if e2e else "- -").split(),
        ]
    )


def _line(cells: Sequence[str]) -> str:
    first, *others = zip(cells, _COLUMNS, strict=True)
    return f"{first[0]:<{first[1][1]}}" + "".join(f"{cell:>{width}}" for cell, (_, width) in others)
