"""Sizes and pixels against the checkpoint's own processor in transformers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.errors import BadMedia
from qvl.media.resize import resize_bicubic, smart_resize

FACTOR, MIN, MAX = 28, 3136, 12_845_056


@pytest.fixture(scope="module")
def processor():
    from transformers.models.qwen2_vl import image_processing_qwen2_vl

    return image_processing_qwen2_vl


def random_sizes(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """A third ordinary, a third log-uniform up to 20,000, a third thin ones near the ratio of 200."""
    sizes: list[tuple[int, int]] = []
    while len(sizes) < count:
        kind = len(sizes) % 3
        if kind == 0:
            height, width = (int(side) for side in rng.integers(1, 3000, size=2))
        elif kind == 1:
            height, width = (int(side) for side in np.exp(rng.uniform(0, np.log(20_000), size=2)))
        else:
            height = int(rng.integers(1, 60))
            width = int(height * rng.uniform(100, 200))
            height, width = (width, height) if rng.random() < 0.5 else (height, width)
        if max(height, width) / min(height, width) <= 200:
            sizes.append((height, width))
    return sizes


def test_sizes_equal_the_reference_for_10_000_random_ones(processor):
    rng = np.random.default_rng(3)
    for number, (height, width) in enumerate(random_sizes(rng, 10_000)):
        low, high = (MIN, MAX) if number % 2 else (int(rng.integers(1, 300_000)), int(rng.integers(300_000, 2_000_000)))
        ours = smart_resize(height, width, factor=FACTOR, min_pixels=low, max_pixels=high)
        assert ours == processor.smart_resize(height, width, FACTOR, low, high), (height, width, low, high)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 1990), (28, 812)),  # qwen-vl-utils says (28, 1988) here; the checkpoint's processor decides
        ((13, 2600), (28, 812)),
        ((1, 1), (56, 56)),
        ((1, 200), (28, 812)),
        ((3, 1), (112, 56)),
        ((27, 27), (56, 56)),
        ((14, 14), (56, 56)),
        ((42, 70), (56, 56)),  # 1.5 and 2.5: Python rounds a half to even
        ((8000, 10000), (3192, 4004)),
    ],
)
def test_known_sizes(size, expected):
    assert smart_resize(*size, factor=FACTOR, min_pixels=MIN, max_pixels=MAX) == expected


def test_a_side_never_becomes_zero():
    assert smart_resize(1, 100, factor=FACTOR, min_pixels=0, max_pixels=MAX) == (28, 112)
    assert smart_resize(30, 6000, factor=FACTOR, min_pixels=1, max_pixels=4000)[0] == 28


def test_ratio_200_passes_and_201_does_not():
    assert smart_resize(1, 200, factor=FACTOR, min_pixels=MIN, max_pixels=MAX)
    with pytest.raises(BadMedia, match="200 times"):
        smart_resize(201, 1, factor=FACTOR, min_pixels=MIN, max_pixels=MAX)
    with pytest.raises(BadMedia, match="empty"):
        smart_resize(0, 5, factor=FACTOR, min_pixels=MIN, max_pixels=MAX)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(56 * 56, 10**7))
def test_area_stays_under_the_maximum_where_the_shape_allows_it(height, width, high):
    if max(height, width) > 200 * min(height, width):
        return
    new_height, new_width = smart_resize(height, width, factor=FACTOR, min_pixels=1, max_pixels=high)
    assert new_height % FACTOR == new_width % FACTOR == 0
    assert new_height * new_width <= high or FACTOR in (new_height, new_width)


@pytest.mark.parametrize("size", [(1, 1), (37, 211), (300, 200), (28, 3000), (777, 1001)])
def test_pixels_equal_the_reference_processor(processor, size):
    """The reference's pixel_values, taken back from patches to a picture, are our pixels normalised."""
    rng = np.random.default_rng(size[0])
    picture = rng.integers(0, 256, size=(*size, 3), dtype=np.uint8)
    reference = processor.Qwen2VLImageProcessor(min_pixels=MIN, max_pixels=400_000)
    values = reference(images=[picture], return_tensors="np", input_data_format="channels_last")
    _, rows, columns = (int(side) for side in values["image_grid_thw"][0])
    height, width = smart_resize(*size, factor=FACTOR, min_pixels=MIN, max_pixels=400_000)
    assert (height, width) == (rows * 14, columns * 14)
    ours = resize_bicubic(picture, height, width)
    assert ours.dtype == np.uint8
    patches = values["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    theirs = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(height, width, 3)
    greys = (theirs * reference.image_std + reference.image_mean) * 255
    np.testing.assert_array_equal(np.rint(greys).astype(np.uint8), ours)
    assert np.abs(greys - np.rint(greys)).max() < 1e-2  # so that rounding hid nothing


def test_the_same_size_is_the_same_array():
    picture = np.zeros((28, 56, 3), dtype=np.uint8)
    assert resize_bicubic(picture, 28, 56) is picture


def test_an_area_that_is_just_the_maximum_is_kept():
    """Both sides round to two patches: 56 x 56, and not one pixel too many."""
    assert smart_resize(50, 60, factor=28, min_pixels=1, max_pixels=56 * 56) == (56, 56)
    assert smart_resize(50, 60, factor=28, min_pixels=1, max_pixels=56 * 56 - 1) == (28, 56)
