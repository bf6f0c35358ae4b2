"""The plot of a sweep: every figure at its place, whatever the order, and nothing hidden."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from qvl.bench.load.answer import Outcome
from qvl.bench.load.cases import Load, sweep
from qvl.bench.load.figures import Figures, summarise
from qvl.bench.load.plot import COLORS, save_plot, ticks

TEXT = Load("text", 8, 2, None, 5, 3, pictures=0)


def answered(ttft: float) -> Outcome:
    """Three tokens, one each millisecond after the first."""
    return Outcome(0.0, ttft, ttft + 0.002, 10, 3, 3, [0.001, 0.001])


@pytest.mark.parametrize(
    ("top", "expected"),
    [(10.0, [0, 2, 4, 6, 8, 10]), (0.9, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (101.0, [0, 50, 100, 150]), (1e-3, None)],
)
def test_ticks(top: float, expected: list[float] | None) -> None:
    marks = ticks(top)
    assert marks[-1] >= top > marks[-2]
    assert expected is None or marks == pytest.approx(expected)


def runs(p99: tuple[float, ...]) -> list[Figures]:
    def one(point: Load, slow: float) -> Figures:
        outcomes = [answered(slow if i == 99 else 0.01) for i in range(100)]
        return summarise(point, outcomes, wall=1.0, processes=1, client_cpu=0.0)

    return [one(point, slow) for point, slow in zip(sweep(TEXT, concurrencies=[1, 2, 4]), p99, strict=True)]


def _is_red(pixel: tuple[int, int, int]) -> bool:
    return pixel[0] > 200 and pixel[1] < 80 and pixel[2] < 80


def test_the_plot_shows_the_figures(tmp_path: Path) -> None:
    """The line of the 99th percentile stands where its values are: level when they are, rising when they rise."""

    def heights(p99: tuple[float, ...]) -> list[int]:
        """The highest red pixel under each load, in the panel of TTFT."""
        save_plot(tmp_path / "plot.png", "title", runs(p99))
        with Image.open(tmp_path / "plot.png") as shown:
            assert shown.format == "PNG"
            panel = shown.convert("RGB").crop((70, 44 + 44, 500, 44 + 292))
        width, height = panel.size
        columns = [24, width // 2, width - 25]
        return [
            next(y for y in range(height) if _is_red(panel.getpixel((x, y))))  # type: ignore[arg-type]
            for x in columns
        ]

    level, rising = heights((0.2, 0.2, 0.2)), heights((0.05, 0.1, 0.2))
    assert max(level) - min(level) <= 1
    assert rising[0] > rising[1] > rising[2]
    bottom = 292 - 44
    assert (bottom - rising[1]) / (bottom - rising[2]) == pytest.approx(0.5, abs=0.05)


def test_the_order_of_a_sweep_is_not_that_of_the_plot(tmp_path: Path) -> None:
    figures = runs((0.05, 0.1, 0.2))
    save_plot(tmp_path / "up.png", "title", figures)
    save_plot(tmp_path / "mixed.png", "title", [figures[2], figures[0], figures[1]])
    assert (tmp_path / "mixed.png").read_bytes() == (tmp_path / "up.png").read_bytes()


def test_lines_that_coincide_are_all_seen(tmp_path: Path) -> None:
    """TPOT is the same for every request of these runs: a line below another shows at its edges."""
    save_plot(tmp_path / "plot.png", "title", runs((0.2, 0.2, 0.2)))
    with Image.open(tmp_path / "plot.png") as shown:
        left, top = 520, 44
        panel = np.asarray(shown.convert("RGB").crop((left + 70, top + 44, left + 500, top + 290)), np.int16)
    for color in COLORS:
        off = np.abs(panel - np.array(ImageColor.getrgb(color), np.int16)).max(axis=-1)
        assert off.min() < 40, color


def test_labels_of_levels_that_crowd_are_left_out(tmp_path: Path) -> None:
    """Those between 90 and 100 stand within ten pixels: the last is named."""

    def marked(levels: list[int]) -> list[bool]:
        points = sweep(TEXT, concurrencies=levels)
        figures = [summarise(p, [answered(1.0)], wall=1, processes=1, client_cpu=0) for p in points]
        save_plot(tmp_path / "plot.png", "title", figures)
        with Image.open(tmp_path / "plot.png") as shown:
            band = shown.convert("L").crop((60, 44 + 298, 510, 44 + 314))
        return [bool(dark) for dark in (np.asarray(band).min(axis=0) < 160)]

    assert marked([1, 90, 92, 94, 96, 98, 99, 100]) == marked([1, 100]) != marked([1, 10, 100])


def test_a_plot_with_levels_where_everything_failed(tmp_path: Path) -> None:
    broken = summarise(TEXT, [Outcome(0.0, error="gone")], wall=1.0, processes=1, client_cpu=0.0)
    save_plot(tmp_path / "plot.png", "title", [broken])
    assert (tmp_path / "plot.png").stat().st_size > 0
