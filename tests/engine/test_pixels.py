"""Pixels in files of another process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from qvl.engine.pixels import copy_pixels, map_pixels
from qvl.engine.protocol import PixelFile

PIXELS = np.random.default_rng(1).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)


def file_of(folder: Path) -> PixelFile:
    path = folder / "pixels"
    path.write_bytes(PIXELS.tobytes())
    return PixelFile(str(path), PIXELS.shape)


def test_a_file_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(b"123")
    with pytest.raises(ValueError, match="needs 12"):
        map_pixels(PixelFile(str(path), (1, 2, 2, 3)))


def test_mapped_pixels_can_be_written_without_touching_the_file(tmp_path: Path) -> None:
    """torch wants writable memory; another name of the same bytes (n > 1) must not see a change."""
    file = file_of(tmp_path)
    other = tmp_path / "q"
    os.link(file.path, other)
    array = map_pixels(file)
    assert array is not None
    assert np.array_equal(array, PIXELS)
    array[:] = 9
    assert other.read_bytes() == PIXELS.tobytes()


def test_copies_are_the_pixels_as_often_as_they_are_made(tmp_path: Path) -> None:
    array = map_pixels(file_of(tmp_path))
    assert array is not None
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # a sequence that was preempted may be encoded again
        out = np.zeros_like(PIXELS)
        copy_pixels(array, out)
        assert np.array_equal(out, PIXELS)


@pytest.mark.parametrize("part", [np.s_[1:], np.s_[:, ::2], np.s_[...]])
def test_parts_and_plain_arrays_are_copied_as_they_are(part: tuple[slice, ...], tmp_path: Path) -> None:
    array = map_pixels(file_of(tmp_path))
    assert array is not None
    for pixels in (array[part], PIXELS[part]):
        out = np.zeros(pixels.shape, dtype=np.uint8)
        copy_pixels(pixels, out)
        assert np.array_equal(out, PIXELS[part])


def test_a_file_that_was_cut_is_an_error_and_not_a_wait(tmp_path: Path) -> None:
    file = file_of(tmp_path)
    other = tmp_path / "q"
    os.link(file.path, other)
    array = map_pixels(file)
    assert array is not None
    os.truncate(other, 10)
    with pytest.raises(OSError, match="shorter"):
        copy_pixels(array, np.zeros_like(PIXELS))
