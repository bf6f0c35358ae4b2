"""Where two pictures differ, without a model: what is changed is found, what coding does is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from qvl.tasks.differences import difference, draw_difference
from qvl.tasks.pictures import Pixels


def scene() -> Image.Image:
    picture = Image.new("RGB", (640, 480), (240, 240, 235))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((40, 40, 300, 120), fill=(40, 60, 160))
    pen.ellipse((380, 200, 520, 340), fill=(200, 120, 20))
    pen.text((60, 60), "Hello", fill="white")
    return picture


def pixels(picture: Image.Image) -> Pixels:
    return np.asarray(picture.convert("RGB"))


def changed_scene() -> Image.Image:
    picture = scene()
    pen = ImageDraw.Draw(picture)
    pen.rectangle((100, 400, 159, 439), fill=(0, 0, 0))
    pen.rectangle((600, 10, 619, 29), fill=(250, 0, 0))
    return picture


def test_every_change_has_its_place() -> None:
    found = difference(pixels(scene()), pixels(changed_scene()))
    assert len(found.regions) == 2 and found.same_size and not found.identical
    for box, wanted in zip(found.regions, ((600, 10, 620, 30), (100, 400, 160, 440)), strict=True):
        assert all(abs(got - want) <= 1 for got, want in zip(box, wanted, strict=True))  # the blur's pixel
    assert found.changed == pytest.approx((60 * 40 + 20 * 20) / (640 * 480), rel=0.15)
    assert found.told().endswith(" % of the pixels differ, in 2 places")


def test_the_same_picture_is_told_apart_from_a_like_one() -> None:
    same = difference(pixels(scene()), pixels(scene()))
    assert same.identical and same.regions == () and same.told() == "the pictures are the same, pixel for pixel"
    other = pixels(scene()).copy()
    other[5, 5, 0] -= 1
    like = difference(pixels(scene()), other)
    assert not like.identical and like.regions == ()


def test_a_thin_line_counts() -> None:
    picture = scene()
    ImageDraw.Draw(picture).line((100, 400, 300, 400), fill="black")
    (box,) = difference(pixels(scene()), pixels(picture)).regions
    assert all(abs(got - want) <= 1 for got, want in zip(box, (100, 400, 301, 401), strict=True))


@pytest.mark.parametrize("quality", [95, 75, 50])
def test_coding_is_no_difference(quality: int) -> None:
    buffer = io.BytesIO()
    scene().save(buffer, "JPEG", quality=quality)
    found = difference(pixels(scene()), pixels(Image.open(buffer)))
    assert not found.identical and found.regions == () and found.changed == 0


@pytest.mark.parametrize("size", [(320, 240), (1280, 960), (700, 500)])
def test_another_size_is_no_difference_but_a_change_is(size: tuple[int, int]) -> None:
    resized = scene().resize(size, Image.Resampling.LANCZOS)
    found = difference(pixels(scene()), pixels(resized))
    assert not found.same_size and found.regions == () and "different sizes" in found.told()
    found = difference(pixels(scene()), pixels(changed_scene().resize(size, Image.Resampling.LANCZOS)))
    assert len(found.regions) == 2 and found.mask.shape == (480, 640)
    for box, wanted in zip(found.regions, ((600, 10, 620, 30), (100, 400, 160, 440)), strict=True):
        assert all(abs(got - want) <= 6 for got, want in zip(box, wanted, strict=True))


@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((1, 1), (9, 9)), ((3000, 2), (2, 3000)), ((97, 13), (97, 13))])
def test_odd_sizes(sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    black, white = (Image.new("RGB", size, color) for size, color in zip(sizes, ("black", "white"), strict=True))
    found = difference(pixels(black), pixels(white))
    assert found.regions == ((0, 0, *sizes[0]),) and found.changed == 1
    assert draw_difference(pixels(black), found).size >= sizes[0]


def test_noise_everywhere_ends_in_time() -> None:
    noise = np.random.default_rng(1).integers(0, 256, (1200, 1600, 3), np.uint8)
    sparse = pixels(Image.new("RGB", (1600, 1200), "white")).copy()
    sparse[::40, ::40] = 0
    found = difference(noise, sparse)
    assert len(found.regions) >= 1
    draw_difference(noise, found)


def test_the_drawing_shows_the_place_in_red_and_the_rest_pale() -> None:
    first, second = pixels(scene()), pixels(changed_scene())
    before = first.copy()
    drawn = np.asarray(draw_difference(first, difference(first, second)))
    assert np.array_equal(first, before) and drawn.shape == first.shape
    assert tuple(drawn[420, 130]) == (220, 0, 30)
    assert (drawn[60:100, 200:280] > 150).all()  # the dark rectangle, faded
