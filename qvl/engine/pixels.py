"""Pixels that another process left in a file: an array over the file's pages, and the file itself for who wants a copy.

Knows files. Does not know devices, nor torch.
"""

from __future__ import annotations

import mmap
import os
from io import FileIO
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qvl.engine.protocol import PixelFile

Pixels: TypeAlias = npt.NDArray[np.uint8]


class FilePixels(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that knows the open file behind it. What is made of it (a part, a sum) does not."""

    file: FileIO | None = None


def map_pixels(file: PixelFile | None) -> Pixels | None:
    """uint8 [frames, h, w, 3] of a file, which is unlinked at once: the mapping lives as long as the array does.

    The mapping is private (copy on write): nothing can change the file's pages, and torch takes the array uncopied.
    Raises `OSError` when the file is not there, `ValueError` when it has not the size of its shape.
    """
    if file is None:
        return None
    opened = FileIO(file.path)
    try:
        os.unlink(file.path)
        size = os.fstat(opened.fileno()).st_size
        expected = file.shape[0] * file.shape[1] * file.shape[2] * file.shape[3]
        if size != expected or size == 0:
            raise ValueError(f"a pixel file has {size} bytes, its shape {file.shape} needs {expected}")
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY)
    except BaseException:
        opened.close()
        raise
    array = np.frombuffer(mapped, dtype=np.uint8).reshape(file.shape).view(FilePixels)
    array.file = opened
    return array


def copy_pixels(pixels: Pixels, out: Pixels) -> None:
    """Into `out`, of the same shape, C-contiguous. A file is read: a third of the time that it takes to touch the pages
    of a mapping one by one.
    """
    file = pixels.file if isinstance(pixels, FilePixels) else None
    if file is None:
        np.copyto(out, pixels)
        return
    file.seek(0)
    left = memoryview(out.reshape(-1).data)
    while left:
        count = file.readinto(left)
        if not count:
            raise OSError("a pixel file has become shorter")
        left = left[count:]
