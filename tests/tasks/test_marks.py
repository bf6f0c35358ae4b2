"""What is drawn can be seen: on any background, at any size, and never in the original."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from qvl.tasks import fonts
from qvl.tasks.boxes import Found
from qvl.tasks.marks import COLORS, SMALLEST_SIDE, draw_marks


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    """The ratio of relative luminances, as WCAG has it."""

    def luminance(color: np.ndarray) -> float:
        linear = np.where(color / 255 <= 0.03928, color / 255 / 12.92, ((color / 255 + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (128, 128, 128), *COLORS])
def test_an_outline_stands_out_from_any_background(background: tuple[int, int, int]) -> None:
    picture = Image.new("RGB", (600, 400), background)
    drawn = np.asarray(draw_marks(picture, [Found("", (100, 100, 300, 300))]).picture)
    column = drawn[90:110, 200].astype(float)  # down through the upper side of the box
    assert max(contrast(pixel, np.array(background, float)) for pixel in column) >= 3


def test_labels_are_legible_and_their_colours_differ() -> None:
    assert len(set(COLORS)) == len(COLORS)
    assert all(contrast(np.array(color, float), np.array((255, 255, 255), float)) >= 4.5 for color in COLORS)


def test_the_original_stays_as_it_is() -> None:
    picture = Image.new("RGB", (600, 400), "white")
    drawing = draw_marks(picture, [Found("dog", (10, 10, 90, 90)), Found("tip", None, point=(300, 200))])
    assert picture.getcolors() == [(240000, (255, 255, 255))]
    assert drawing.picture.size == (600, 400) and drawing.scale == 1


def changed(before: Image.Image, after: Image.Image) -> np.ndarray:
    return np.any(np.asarray(before.convert("RGB")) != np.asarray(after), axis=-1)


def test_a_small_picture_is_enlarged_and_its_box_with_it() -> None:
    drawing = draw_marks(Image.new("RGB", (30, 20), "white"), [Found("", (6, 5, 20, 15))])
    assert max(drawing.picture.size) >= SMALLEST_SIDE and drawing.picture.size == (
        30 * drawing.scale,
        20 * drawing.scale,
    )
    rows, columns = np.nonzero(changed(Image.new("RGB", drawing.picture.size, "white"), drawing.picture))
    line = 8  # the outline lies around the edges
    for edge, place in ((columns.min(), 6), (columns.max(), 20), (rows.min(), 5), (rows.max(), 15)):
        assert abs(edge - place * drawing.scale) <= line


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 2000), (9000, 40)])
def test_thin_and_tiny_pictures_have_room_for_labels(size: tuple[int, int]) -> None:
    found = [Found("left", (0, 0, 1, 1)), Found("all of it", (0, 0, *size)), Found("tip", None, point=(0, 0))]
    drawing = draw_marks(Image.new("RGB", size, "black"), found)
    assert min(drawing.picture.size) >= 40


def test_a_box_around_the_whole_picture_is_seen() -> None:
    white = Image.new("RGB", (2400, 1600), "white")
    seen = changed(white, draw_marks(white, [Found("", (0, 0, 2400, 1600))]).picture)
    edges = seen[800, :5], seen[800, -5:], seen[:5, 1200], seen[-5:, 1200]
    assert all(edge.sum() >= 3 for edge in edges)


def test_labels_do_not_cover_each_other() -> None:
    """Two boxes in one place: both plates are there in full."""
    white = Image.new("RGB", (600, 400), "white")
    first, second = Found("first label", (200, 200, 300, 300)), Found("second label", (200, 200, 300, 300))
    drawn = np.asarray(draw_marks(white, [first, second]).picture)
    plates = [np.all(drawn == color, axis=-1).sum() for color in COLORS[:2]]
    alone = [
        np.all(np.asarray(draw_marks(white, [item]).picture) == COLORS[0], axis=-1).sum() for item in (first, second)
    ]
    assert plates[1] >= 0.9 * alone[1] and plates[0] >= 0.5 * alone[0]


def test_a_label_without_a_font_becomes_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_files", lambda needed: iter(()))
    fonts._file_with.cache_clear()
    white = Image.new("RGB", (600, 400), "white")
    found = [Found("dog", (10, 60, 90, 90)), Found("狗", (300, 200, 400, 300))]
    drawing = draw_marks(white, found)
    assert drawing.numbered
    fonts._file_with.cache_clear()
    numbered = draw_marks(white, [found[0], Found("2", (300, 200, 400, 300))])
    assert not numbered.numbered and not changed(numbered.picture, drawing.picture).any()


def test_a_font_is_asked_for_the_characters_it_must_have(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fonts.font_for(["dog"], 20)
    assert own is not None and own.size == 20
    monkeypatch.setattr(fonts, "_told_by_fontconfig", lambda needed: [])
    monkeypatch.setattr(fonts, "_in_folders", lambda: iter(["/nowhere/missing.ttf"]))
    fonts._file_with.cache_clear()
    assert fonts.font_for(["狗"], 20) is None
    fonts._file_with.cache_clear()


def test_chinese_is_drawn_where_a_font_has_it() -> None:
    font = fonts.font_for(["红色圆形"], 20)
    if font is None:
        pytest.skip("no font of this machine has Chinese characters")
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert font.getmask("红").getbbox() is not None
    assert bytes(font.getmask("红")) != bytes(font.getmask("圆"))
