"""Pixels that another process left in a file: an array over the file's pages, and the file itself for who wants a copy.

Or in a room, memory that both share for good: no page of it is new, and a GPU may read it by itself.
Knows files. Does not know devices, nor torch.
"""

from __future__ import annotations

import mmap
import os
import time
import weakref
from collections.abc import Mapping
from io import FileIO
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from qvl.engine.protocol import NUM_TICKETS, OWN_FILE, ROOM_HEAD, PixelFile, UseRoom

SOON_SECONDS = 0.02  # most pictures are decoded then
NAP_SECONDS = 0.0005

Pixels: TypeAlias = npt.NDArray[np.uint8]


class FilePixels(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that knows the open file behind it. What is made of it (a part, a sum) does not."""

    file: FileIO | None = None


class PromisedPixels(np.ndarray[Any, np.dtype[np.uint8]]):
    """An array that another process still fills. What is made of it does not know that."""

    room: mmap.mmap
    place: int
    soon: float

    @property
    def is_ready(self) -> bool:
        return bool(self.room[self.place])

    def wait(self, seconds: float) -> None:
        """Until it is ready, or for so long. Who comes soon is met awake: waking up takes longer than a look."""
        now = time.monotonic()
        end = now + seconds
        while not self.is_ready and now < end:
            time.sleep(0 if now < self.soon else NAP_SECONDS)
            now = time.monotonic()


class Room:
    """An asker's memory, see `protocol`. Raises `OSError` when the file is not there, `ValueError` for a wrong size."""

    def __init__(self, use: UseRoom) -> None:
        descriptor = os.open(use.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(descriptor).st_size != use.num_bytes or use.num_bytes <= ROOM_HEAD:
                raise ValueError(f"a room for pixels has not the {use.num_bytes} bytes that it should have")
            self._mapped = mmap.mmap(descriptor, use.num_bytes)
        finally:
            os.close(descriptor)
        self.memory: Pixels = np.frombuffer(self._mapped, dtype=np.uint8)

    def enter(self) -> None:
        """Tell the asker that its pixels are seen."""
        self._mapped[0] = 1

    def pixels(self, file: PixelFile) -> Pixels:
        """uint8 [frames, h, w, 3], the asker's again once nobody has this array any more. Raises `ValueError`."""
        size = num_bytes(file)
        is_inside = ROOM_HEAD <= file.offset <= len(self.memory) - size
        if not 0 < file.ticket < NUM_TICKETS or min(file.shape) < 1 or not is_inside:
            raise ValueError(f"{file.shape} at {file.offset} is not within a room for pixels")
        array = np.frombuffer(self._mapped, dtype=np.uint8, count=size, offset=file.offset)
        weakref.finalize(array, self._mapped.__setitem__, file.ticket, 0).atexit = False
        if self._mapped[NUM_TICKETS + file.ticket]:
            return array.reshape(file.shape)
        promised = array.reshape(file.shape).view(PromisedPixels)
        promised.room, promised.place = self._mapped, NUM_TICKETS + file.ticket
        promised.soon = time.monotonic() + SOON_SECONDS
        return promised


def num_bytes(file: PixelFile) -> int:
    return file.shape[0] * file.shape[1] * file.shape[2] * file.shape[3]


def map_pixels(file: PixelFile | None, rooms: Mapping[str, Room] | None = None) -> Pixels | None:
    """uint8 [frames, h, w, 3] of a place in one of `rooms`, or of a file.

    A file is unlinked at once: the mapping lives as long as the array does.
    The mapping is private (copy on write): nothing can change the file's pages, and torch takes the array uncopied.
    Raises `OSError` when the file is not there, `ValueError` when it has not the size of its shape.
    """
    if file is None:
        return None
    if file.ticket != OWN_FILE:
        if rooms is None or file.path not in rooms:
            raise ValueError("a room for pixels that nobody has announced")
        return rooms[file.path].pixels(file)
    opened = FileIO(file.path)
    try:
        os.unlink(file.path)
        size = os.fstat(opened.fileno()).st_size
        expected = num_bytes(file)
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
