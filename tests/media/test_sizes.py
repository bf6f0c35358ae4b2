"""Sizes for the model: what a request asks for, within the checkpoint's bounds."""

from __future__ import annotations

import dataclasses

import pytest

from qvl.media.resize import smart_resize
from qvl.media.sizes import frame_size, picture_size
from qvl.specs import ProcessorSpec
from qvl.types import PixelLimits

SPEC = ProcessorSpec()


def test_one_bound_given_alone_moves_the_other_out_of_its_way():
    small = dataclasses.replace(SPEC, min_pixels=200_000, max_pixels=400_000)
    height, width = picture_size(300, 300, small, PixelLimits(max_pixels=50_000))
    assert height * width <= 50_000


@pytest.mark.parametrize(
    ("count", "most"),
    [(4, 602_112), (64, 602_112), (100, 385_345), (300, 128_450), (400, 105_369), (768, 105_369)],
)
def test_more_frames_are_smaller(count, most):
    """Per frame at most a share of the whole video's pixels, but never under 1.05 x the minimum."""
    assert frame_size(count, 1080, 1920, SPEC, PixelLimits()) == smart_resize(
        1080, 1920, factor=28, min_pixels=100_352, max_pixels=most
    )


def test_a_request_sizes_frames_too():
    assert frame_size(8, 1080, 1920, SPEC, PixelLimits(max_pixels=50_000)) == smart_resize(
        1080, 1920, factor=28, min_pixels=1, max_pixels=50_000
    )
    assert frame_size(8, 1080, 1920, SPEC, PixelLimits(max_pixels=10**9)) == frame_size(
        8, 1080, 1920, SPEC, PixelLimits()
    )
    small = frame_size(8, 60, 80, SPEC, PixelLimits(min_pixels=1))
    assert small == smart_resize(60, 80, factor=28, min_pixels=1, max_pixels=602_112)
    for size in ((1080, 1920), (60, 80)):
        height, width = frame_size(768, *size, SPEC, PixelLimits(min_pixels=600_000))
        assert height * width <= 130_000  # the whole video's budget is stronger than a wish for one frame


def test_all_frames_of_a_video_share_total_pixels():
    # qwen-vl-utils: per frame at most total / frames * 2, and never under 1.05 x the minimum
    assert frame_size(16, 1080, 1920, SPEC, PixelLimits(total_pixels=1_600_000)) == smart_resize(
        1080, 1920, factor=28, min_pixels=100_352, max_pixels=200_000
    )
    assert frame_size(16, 1080, 1920, SPEC, PixelLimits(total_pixels=10**12)) == frame_size(
        16, 1080, 1920, SPEC, PixelLimits()
    )


def test_a_request_may_name_the_size():
    wish = PixelLimits(resized_height=290, resized_width=555)
    assert picture_size(3000, 4000, SPEC, wish) == (280, 560)
    assert frame_size(4, 3000, 4000, SPEC, PixelLimits(resized_height=420, resized_width=700)) == (420, 700)
    huge = PixelLimits(resized_height=60_000, resized_width=60_000)
    height, width = picture_size(30, 40, SPEC, huge)
    assert height * width <= SPEC.max_pixels
