"""What a batch came to: counts, tokens, times, the slowest lines, errors by kind. Knows numbers only."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

NUM_SLOWEST = 5


@dataclass(slots=True)
class Report:
    """Grows while the batch runs. `before` counts what an earlier run had answered; `total` is all lines of the input.

    `failed` are this run's, `failed_before` those that an earlier run left. Times are seconds.
    `trouble` is what keeps the server from answering just now.
    """

    total: int
    before: int = 0
    failed_before: int = 0
    answered: int = 0
    failed: int = 0
    asked_again: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    concurrency: int = 0
    where: str = ""
    trouble: str = ""
    errors: Counter[str] = field(default_factory=Counter)
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    _times: array[float] = field(default_factory=lambda: array("f"))

    @property
    def done(self) -> int:
        """Lines with an answer or a recorded error, of all runs."""
        return self.before + self.answered + self.failed

    @property
    def any_failed(self) -> bool:
        return self.failed + self.failed_before > 0

    def add_answer(self, seconds: float, number: int, custom_id: str, tokens: tuple[int, int]) -> None:
        """One line was answered, `seconds` after it was sent. `tokens`: of the prompt, and generated."""
        self.answered += 1
        self.prompt_tokens += tokens[0]
        self.completion_tokens += tokens[1]
        self._times.append(seconds)
        if len(self.slowest) < NUM_SLOWEST:
            heapq.heappush(self.slowest, (seconds, number, custom_id))
        elif seconds > self.slowest[0][0]:
            heapq.heapreplace(self.slowest, (seconds, number, custom_id))

    def add_failure(self, kind: str) -> None:
        """One line ended in an error."""
        self.failed += 1
        self.errors[kind] += 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a program."""
        p50, p99 = self._quantiles()
        return {
            "total": self.total,
            "answered_before": self.before,
            "failed_before": self.failed_before,
            "answered": self.answered,
            "failed": self.failed,
            "asked_again": self.asked_again,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 3),
            "lines_per_second": self._per_second(self.answered + self.failed),
            "concurrency": self.concurrency,
            "answered_by": self.where,
            "p50_seconds": p50,
            "p99_seconds": p99,
            "slowest": [{"seconds": round(s, 3), "line": n, "custom_id": c} for s, n, c in self._slowest_first()],
            "errors": dict(self.errors.most_common()),
        }

    def lines(self) -> list[str]:
        """The same for people."""
        before = f", {self.before:,} from an earlier run ({self.failed_before:,} failed)" if self.before else ""
        again = f", {self.asked_again:,} asked again" if self.asked_again else ""
        told = [f"{self.answered:,} answered, {self.failed:,} failed{before}{again}"]
        if self.answered + self.failed:
            rate = self._per_second(self.answered + self.failed)
            told.append(
                f"{self.seconds:.1f} s, {rate:.1f} lines/s, at most {self.concurrency} at once, by {self.where}"
            )
        if self.answered:
            p50, p99 = self._quantiles()
            tokens = f"{self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} generated"
            told.append(f"{tokens}; an answer took {p50:.2f} s (99 of 100: {p99:.2f} s)")
            told.append("slowest: " + ", ".join(f"line {n} {s:.2f} s" for s, n, _ in self._slowest_first()))
        if self.errors:
            told.append("errors: " + ", ".join(f"{kind} {count:,}" for kind, count in self.errors.most_common()))
        return told

    def _slowest_first(self) -> list[tuple[float, int, str]]:
        return sorted(self.slowest, reverse=True)

    def _per_second(self, count: int) -> float:
        return round(count / self.seconds, 3) if self.seconds > 0 else 0.0

    def _quantiles(self) -> tuple[float, float]:
        """The median and the 99th percentile of the answers' times."""
        if not self._times:
            return 0.0, 0.0
        times = sorted(self._times)
        return round(times[len(times) // 2], 3), round(times[min(len(times) - 1, len(times) * 99 // 100)], 3)
