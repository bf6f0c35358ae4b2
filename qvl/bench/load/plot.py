"""Latency against load as a PNG: one panel for each of TTFT, TPOT and E2E, and one for what the server got through.

Knows axes and lines. Does not know how the figures came about. Pillow draws: it is installed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from qvl.bench.load.figures import Figures, Spread

SCALE = 2  # drawn twice as large and shrunk: Pillow's lines have no smooth edges
PANEL = (520, 340)
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 70, 20, 44, 48
TITLE_HEIGHT = 44
INK, FAINT, PAPER = "#222222", "#dddddd", "#ffffff"
COLORS = ("#1f77b4", "#ff7f0e", "#d62728")

Color: TypeAlias = str
Point: TypeAlias = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: a value for each load, None where nothing was measured."""

    label: str
    values: Sequence[float | None]
    color: Color


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    series: Sequence[Series]


def save_plot(path: Path, title: str, figures: Sequence[Figures]) -> None:
    """Write the plot of a sweep, one point for each of `figures`, from the least load up. Raises OSError."""
    figures = sorted(figures, key=lambda run: run.load.level)
    levels = [run.load.level for run in figures]
    x_label = "concurrency" if figures[0].load.rate is None else "requests per second asked for"
    panels = [
        _latency("time to first token, ms", figures, lambda run: run.ttft_ms),
        _latency("time per further token, ms", figures, lambda run: run.tpot_ms),
        _latency("whole answer, ms", figures, lambda run: run.e2e_ms),
        Panel("requests answered per second", [Series("req/s", [run.req_s for run in figures], COLORS[0])]),
    ]
    width, height = PANEL
    canvas = Image.new("RGB", (2 * width * SCALE, (2 * height + TITLE_HEIGHT) * SCALE), PAPER)
    brush = Brush(ImageDraw.Draw(canvas), (0, 0))
    brush.text((20, TITLE_HEIGHT / 2), title, size=17, anchor="lm")
    for i, panel in enumerate(panels):
        _draw(Brush(brush.draw, (i % 2 * width, TITLE_HEIGHT + i // 2 * height)), panel, levels, x_label)
    canvas.resize((2 * width, 2 * height + TITLE_HEIGHT), Image.Resampling.LANCZOS).save(path, "PNG")


def ticks(top: float, about: int = 5) -> list[float]:
    """Round numbers from 0 to the first one that is not below `top`."""
    rough = top / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [step * i for i in range(math.ceil(round(top / step, 6)) + 1)]


@dataclass(frozen=True, slots=True)
class Brush:
    """Draws in pixels of the finished picture, from `origin`."""

    draw: ImageDraw.ImageDraw
    origin: Point

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        self.draw.line([self._at(p) for p in points], fill=color, width=round(width * SCALE), joint="curve")

    def dot(self, point: Point, color: Color, radius: float) -> None:
        x, y = self._at(point)
        r = radius * SCALE
        self.draw.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def text(self, point: Point, text: str, *, size: int = 12, anchor: str = "mm", color: Color = INK) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text(self._at(point), text, fill=color, font=font, anchor=anchor)

    def _at(self, point: Point) -> Point:
        return (point[0] + self.origin[0]) * SCALE, (point[1] + self.origin[1]) * SCALE


def _latency(title: str, figures: Sequence[Figures], spread: Callable[[Figures], Spread | None]) -> Panel:
    spreads = [spread(run) for run in figures]
    names = ("p50", "p90", "p99")
    return Panel(
        title,
        [
            Series(name, [getattr(s, name) if s is not None else None for s in spreads], color)
            for name, color in zip(names, COLORS, strict=True)
        ],
    )


def _draw(brush: Brush, panel: Panel, levels: Sequence[float], x_label: str) -> None:
    left, right = MARGIN_LEFT, PANEL[0] - MARGIN_RIGHT
    top, bottom = MARGIN_TOP, PANEL[1] - MARGIN_BOTTOM
    marks = ticks(max((v for s in panel.series for v in s.values if v is not None), default=0.0) or 1.0)
    logs = [math.log2(level) for level in levels]
    span = max(logs) - min(logs)

    def x_of(log: float) -> float:
        inset = 24  # the first and the last point stand clear of the frame
        return left + inset + (right - left - 2 * inset) * ((log - min(logs)) / span if span else 0.5)

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    for mark in marks:
        brush.line([(left, y_of(mark)), (right, y_of(mark))], FAINT if mark else INK, 1)
        brush.text((left - 8, y_of(mark)), f"{mark:g}", anchor="rm")
    free = math.inf  # from here on a label of a level would touch the one to its right
    for level, log in reversed(list(zip(levels, logs, strict=True))):
        x, half = x_of(log), 4 * len(f"{level:g}")
        if x + half <= free:
            brush.text((x, bottom + 14), f"{level:g}")
            free = x - half - 3
    brush.text(((left + right) / 2, bottom + 34), x_label)
    brush.text((left, top - 24), panel.title, size=14, anchor="lm")
    for i, series in reversed(list(enumerate(panel.series))):
        points = [(x_of(x), y_of(v)) for x, v in zip(logs, series.values, strict=True) if v is not None]
        # The last series is the thickest and lies below: one that hides another would say that it was not measured.
        extra = 1.2 * i
        if points:
            brush.line(points, series.color, 2 + extra)
        for point in points:
            brush.dot(point, series.color, 3 + extra)
        if len(panel.series) > 1:
            brush.text(
                (right - 46 * (len(panel.series) - 1 - i), top - 24), series.label, anchor="rm", color=series.color
            )
