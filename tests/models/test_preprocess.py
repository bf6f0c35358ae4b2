"""Patches against transformers' own processor, and the device's resize against Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qvl.models import preprocess
from qvl.models.preprocess import patchify, resize
from qvl.specs import ProcessorSpec

SPEC = ProcessorSpec()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def picture(height: int, width: int) -> np.ndarray:
    """Edges, gradients and noise: [h, w, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack((x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)), -1).astype(np.uint8)
    smooth[height // 4 : height // 2, width // 3 : width // 2] = (255, 0, 255)
    smooth[height // 2 :, : width // 3] = noise(height - height // 2, width // 3, 3)
    return smooth


def reference(frames: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """transformers' slow processor on frames that already have their size."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(do_resize=False)
    patches, grid = processor._preprocess(
        list(frames), do_resize=False, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=processor.image_mean, image_std=processor.image_std,
        patch_size=14, temporal_patch_size=2, merge_size=2, do_convert_rgb=False,
    )  # fmt: skip
    return patches, grid


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 28, 28), (1, 56, 140), (1, 84, 56), (2, 56, 28), (4, 28, 84), (5, 56, 56)]
)
def test_patches_equal_the_reference(frames: int, height: int, width: int) -> None:
    pixels = noise(frames, height, width, 3)
    expected, (t, h, w) = reference(pixels)
    ours = patchify(torch.from_numpy(pixels), height, width, SPEC)
    assert ours.dtype == torch.float32
    assert tuple(ours.shape) == (t * h * w, 3 * 2 * 14 * 14) == expected.shape
    assert np.abs(ours.numpy() - expected).max() < 1e-6


def test_another_geometry_follows_the_specification() -> None:
    spec = ProcessorSpec(patch_size=4, temporal_patch_size=3, merge_size=2, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    pixels = noise(4, 16, 8, 3)
    ours = patchify(torch.from_numpy(pixels), 16, 8, spec).view(2, 2, 1, 2, 2, 3, 3, 4, 4)
    padded = np.concatenate((pixels, pixels[-1:], pixels[-1:]))
    for t, i, y, x, c, f in np.ndindex(2, 2, 2, 2, 3, 3):
        square = padded[3 * t + f, 8 * i + 4 * y : 8 * i + 4 * y + 4, 4 * x : 4 * x + 4, c]
        assert np.allclose(ours[t, i, 0, y, x, c, f].numpy(), square / 255)


@pytest.mark.parametrize(
    ("size", "to"),
    [((333, 500), (140, 224)), ((100, 80), (280, 224)), ((61, 59), (56, 56)), ((1200, 1600), (448, 588)),
     ((30, 900), (28, 840)), ((99, 112), (56, 112))],
)  # fmt: skip
def test_the_device_resize_is_within_two_grey_levels_of_pillow(size: tuple[int, int], to: tuple[int, int]) -> None:
    for pixels in (picture(*size), noise(*size, 3)):
        expected = np.asarray(Image.fromarray(pixels).resize(to[::-1], Image.Resampling.BICUBIC))
        ours = resize(torch.from_numpy(pixels)[None].permute(0, 3, 1, 2), *to)[0].permute(1, 2, 0).numpy()
        difference = np.abs(ours.astype(int) - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.01


def test_original_pixels_are_resized_on_the_way() -> None:
    pixels = picture(97, 133)
    resized = np.array(Image.fromarray(pixels).resize((140, 112), Image.Resampling.BICUBIC))
    expected = patchify(torch.from_numpy(resized)[None], 112, 140, SPEC)
    ours = patchify(torch.from_numpy(pixels)[None], 112, 140, SPEC)
    assert (ours - expected).abs().max() < 2.01 / 255 / min(SPEC.image_std)


def test_read_only_pixels_are_left_alone() -> None:
    pixels = noise(1, 28, 28, 3)
    before = pixels.copy()
    patchify(torch.from_numpy(pixels), 28, 28, SPEC)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("at_once", [1, 60 * 28, 100_000])
def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """Whole slices together, one at a time, in bands of rows: every number is the same."""
    rng = np.random.default_rng(0)
    for shape, height, width in (((1, 100, 90, 3), 84, 112), ((5, 56, 84, 3), 56, 84), ((3, 40, 300, 3), 84, 56)):
        frames = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
        whole = patchify(frames, height, width, SPEC)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "AT_ONCE", at_once)
            assert torch.equal(patchify(frames, height, width, SPEC), whole)
        assert torch.equal(patchify(frames, height, width, SPEC, torch.bfloat16), whole.bfloat16())
