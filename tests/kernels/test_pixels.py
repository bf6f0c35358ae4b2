"""Weights and kernels that resize as Pillow does, to the bit; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from qvl.kernels.pixels import BITS, problem_of, taps_of
from qvl.models.preprocess import arrange
from qvl.specs import ProcessorSpec
from tests.kernels.interpreted import DEVICE, INTERPRETED, ON_GPU, here, run_in_the_interpreter

pytestmark = pytest.mark.gpu if ON_GPU else []

Levels = npt.NDArray[np.uint8]
LENGTHS = [(28, 28), (1024, 1036), (640, 448), (61, 56), (5, 84), (3000, 28), (1, 28), (29, 27)]


def noise(*shape: int) -> Levels:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def by_pillow(pixels: Levels, height: int, width: int) -> Levels:
    """Across, then down: from version 13 on Pillow begins with what makes the picture smaller, so it is asked twice."""
    across = [Image.fromarray(one).resize((width, pixels.shape[1]), Image.Resampling.BICUBIC) for one in pixels]
    return np.stack([np.asarray(one.resize((width, height), Image.Resampling.BICUBIC)) for one in across])


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_weights_make_what_pillow_makes(before: int, after: int) -> None:
    line = noise(before)
    starts, *weights = taps_of(before, after).astype(np.int64)
    padded = np.append(line, np.zeros(len(weights), dtype=np.uint8)).astype(np.int64)
    total = sum(weight * padded[starts + t] for t, weight in enumerate(weights)) + (1 << (BITS - 1))
    assert abs(total).max() < 2**31
    expected = np.asarray(Image.fromarray(line[None]).resize((after, 1), Image.Resampling.BICUBIC))[0]
    assert np.array_equal(np.clip(total >> BITS, 0, 255), expected)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests of this file run here")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def made(pixels: Levels, height: int, width: int, spec: ProcessorSpec, dtype: torch.dtype) -> Any:
    from qvl.kernels.on_gpu.pixel_patches import patches

    return patches(torch.from_numpy(pixels).to(DEVICE), height, width, spec, dtype).cpu()


# 16 bits only change what the second kernel writes: no need to see them in every shape, a row of pixels is a program.
@here
@pytest.mark.parametrize(
    ("shape", "narrow"),
    [
        ((1, 28, 28), True),
        ((1, 30, 56), True),
        ((1, 61, 20), False),
        ((1, 28, 90), True),
        ((3, 40, 70), False),
        ((2, 56, 28), False),
    ],
)
def test_patches_are_those_of_pixels_that_pillow_resized(shape: tuple[int, int, int], narrow: bool) -> None:
    spec, height, width = ProcessorSpec(), 28, 56
    pixels = noise(*shape, 3)
    resized = torch.from_numpy(by_pillow(pixels, height, width)).permute(0, 3, 1, 2)
    if len(resized) % 2:
        resized = torch.cat((resized, resized[-1:]))
    expected = arrange(resized.unflatten(0, (-1, 2)), spec, torch.float32)
    ours = made(pixels, height, width, spec, torch.float32)
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() < 1e-5, "a hundredth of a grey level is 1.5e-4"
    if narrow or ON_GPU:
        assert torch.allclose(made(pixels, height, width, spec, torch.bfloat16).float(), expected, rtol=1e-2, atol=1e-3)


@here
def test_another_geometry() -> None:
    spec = ProcessorSpec(patch_size=4, temporal_patch_size=3, merge_size=2, image_mean=(0, 0.5, 1), image_std=(1, 2, 3))
    pixels = noise(4, 16, 8, 3)
    frames = torch.from_numpy(np.concatenate((pixels, pixels[-1:], pixels[-1:]))).permute(0, 3, 1, 2)
    expected = arrange(frames.unflatten(0, (-1, 3)), spec, torch.float32)
    assert (made(pixels, 16, 8, spec, torch.float32) - expected).abs().max() < 1e-5


@here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_trial_takes_what_is_right_and_tells_what_is_not(dtype: torch.dtype) -> None:
    from qvl.kernels.on_gpu import pixel_patches

    class Zeros:
        @staticmethod
        def patches(pixels: torch.Tensor, height: int, width: int, spec: ProcessorSpec, dtype: torch.dtype) -> Any:
            return torch.zeros(4, 1176, dtype=dtype)

    assert problem_of(pixel_patches, ProcessorSpec(), dtype, DEVICE.type) is None
    problem = problem_of(Zeros, ProcessorSpec(), dtype, DEVICE.type)
    assert problem is not None
    assert "wrong numbers" in problem
