"""Pages of a PDF: how large they are drawn, what is on them, and what is said about those that cannot be had."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from qvl.errors import BadMedia, InvalidRequest
from qvl.tasks.pdf import MOST_DPI, POINTS_PER_INCH, Resolution, draw_page, is_pdf, num_pages
from qvl.types import PictureRule
from tests.tasks import documents

A4 = (595.0, 842.0)


def test_pages_are_counted_and_drawn_as_they_are(tmp_path: Path) -> None:
    pictures = [documents.printed(text) for text in ("one", "two", "three")]
    data = documents.pdf_of(pictures)
    assert is_pdf(data) and num_pages(data) == 3
    path = tmp_path / "three.pdf"
    path.write_bytes(data)
    for number, picture in enumerate(pictures, 1):
        drawn = draw_page(path, number, Resolution(dpi=72))
        assert drawn.mode == "RGB" and drawn.size == picture.size
        apart = np.abs(np.asarray(drawn, int) - np.asarray(picture, int)).mean()
        others = [np.abs(np.asarray(drawn, int) - np.asarray(p, int)).mean() for p in pictures if p is not picture]
        assert apart * 4 < min(others)


@pytest.mark.parametrize(
    "rule, context, pixels",
    [
        (PictureRule(28, 3136, 200_704), None, 200_704),
        (PictureRule(28, 3136, 12_845_056), 4096, 2048 * 784),
        (PictureRule(28, 3136, 12_845_056), 1, 784),
    ],
)
def test_a_page_is_as_large_as_the_model_takes_it(rule: PictureRule, context: int | None, pixels: int) -> None:
    resolution = Resolution.for_model(rule, context)
    assert resolution.pixels == pixels
    scale = resolution.scale(*A4)
    assert A4[0] * A4[1] * scale**2 == pytest.approx(min(pixels, A4[0] * A4[1] * (MOST_DPI / POINTS_PER_INCH) ** 2))


def test_print_gains_nothing_above_200_dpi_and_an_unknown_model_gets_150() -> None:
    assert Resolution(pixels=10**9).scale(*A4) == MOST_DPI / POINTS_PER_INCH
    assert Resolution.for_model(None, 4096).scale(*A4) * POINTS_PER_INCH == pytest.approx(150, rel=0.02)


def test_a_resolution_asked_for_is_kept() -> None:
    assert draw_page(documents.blank_page(100, 50), 1, Resolution(dpi=144)).size == (200, 100)
    with pytest.raises(InvalidRequest, match="too large for 600 dpi"):
        draw_page(documents.blank_page(7200, 7200), 1, Resolution(dpi=600))


def test_a_giant_page_is_drawn_small() -> None:
    drawn = draw_page(documents.blank_page(14_400, 14_400), 1, Resolution(pixels=200_704))
    assert drawn.size[0] * drawn.size[1] == pytest.approx(200_704, rel=0.01)


@pytest.mark.parametrize(
    "data, says",
    [
        (documents.locked(), "locked with a password"),
        (b"%PDF-1.4\nnothing that follows", "broken"),
        (documents.pdf_of([documents.printed("x")])[:200], "broken"),
        (documents.no_pages(), "no pages|broken"),
    ],
)
def test_what_cannot_be_opened_says_why(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.pdf"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(BadMedia, match=says) as told:
            num_pages(source)
        assert str(tmp_path) not in told.value.message


def test_what_is_no_pdf() -> None:
    assert not is_pdf(b"\x89PNG") and not is_pdf(b"") and is_pdf(b"junk\n%PDF-1.7")


def test_many_threads_draw_at_once() -> None:
    """pdfium itself may not be used so."""
    data = documents.pdf_of([documents.printed(str(n)) for n in range(4)])
    alone = [draw_page(data, n, Resolution()).tobytes() for n in range(1, 5)]
    drawn: dict[int, bytes] = {}

    def draw(i: int) -> None:
        drawn[i] = draw_page(data, i % 4 + 1, Resolution()).tobytes()

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == {i: alone[i % 4] for i in range(16)}
