"""Memory that an HTTP process shares with the engine: pictures are decoded into it, and a GPU reads them there.

Pages of a new file cost more than the copy that fills them; here none is new. A place is taken for as long as its array
lives, and while the engine has been handed it: that is one ticket for each time, a byte that the engine sets back to 0
(`engine.protocol`). Knows places and tickets. Does not know pictures or requests.
"""

from __future__ import annotations

import logging
import math
import mmap
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qvl.engine.host_memory import available_host_memory
from qvl.engine.protocol import NUM_TICKETS, ROOM_HEAD, PixelFile, UseRoom

logger = logging.getLogger("qvl.backend")

PIECE_BYTES = 256 << 10
PARTS_OF_FREE_MEMORY = 8


@dataclass(slots=True, eq=False)
class _Place:
    """`count` pieces. `wanted` while our array lives; `tickets`: those that have not come back, when last looked at.

    Those that are `promised` are kept until it is settled what came of it.
    """

    first: int
    count: int
    wanted: bool = True
    tickets: list[int] = field(default_factory=list)
    promised: set[int] = field(default_factory=set)

    def leave(self) -> None:
        """Runs within any statement, so that it must not wait for a lock."""
        self.wanted = False


def make_room(num_bytes: int) -> PixelRoom | None:
    """None where that would leave little memory to others."""
    if not 0 < num_bytes * PARTS_OF_FREE_MEMORY <= available_host_memory():
        return None
    try:
        return PixelRoom(num_bytes)
    except (OSError, AttributeError) as error:  # no memory after all, or no Linux
        logger.warning("pictures take the slower way to the engine: %s", error)
        return None


class PixelRoom:
    """At least `num_bytes` for pixels, which are taken now. There is no place until the engine is there. Thread-safe.

    The file has no name: a container's /dev/shm holds 64 MiB. Raises `OSError`.
    """

    def __init__(self, num_bytes: int) -> None:
        num_pieces = -(-num_bytes // PIECE_BYTES)
        size = ROOM_HEAD + num_pieces * PIECE_BYTES
        descriptor = os.memfd_create("qvl-pixels", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, descriptor).atexit = False
        os.posix_fallocate(descriptor, 0, size)
        self._memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        self.announcement = UseRoom(f"/proc/{os.getpid()}/fd/{descriptor}", size)
        self._address = address_of(np.frombuffer(self._memory, dtype=np.uint8))
        self._lock = threading.Lock()
        self._taken = bytearray(num_pieces)
        self._places: dict[int, _Place] = {}
        self._tickets = list(range(1, NUM_TICKETS))

    def empty(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """An array of `shape` with any numbers; None when there is no place for it."""
        size = math.prod(shape)
        count = max(1, -(-size // PIECE_BYTES))
        if not self._memory[0]:
            return None
        with self._lock:
            self._look_for_leavers()
            first = self._taken.find(bytes(count))
            if first < 0:
                return None
            self._taken[first : first + count] = b"\1" * count
            place = self._places[first] = _Place(first, count)
        array = np.frombuffer(self._memory, dtype=np.uint8, count=size, offset=_offset(first))
        weakref.finalize(array, place.leave).atexit = False  # views of it keep it alive
        return array.reshape(shape)

    def hand_over(self, pixels: npt.NDArray[np.uint8], copies: int = 1, *, promised: bool = False) -> list[PixelFile]:
        """Names for `pixels`, uint8 [frames, h, w, 3], each for the engine to take once; empty when there is no place.

        Pixels that lie elsewhere are copied. What lies here must not be written any more, but where it is `promised`:
        then it is not read before `settle`, which must follow whatever happens.
        """
        frames, height, width, channels = pixels.shape
        place = self._place_of(pixels)
        if place is None and promised:
            return []
        if place is None:
            copy = self.empty(pixels.shape)
            if copy is None:
                return []
            np.copyto(copy, pixels)
            return self.hand_over(copy, copies)
        with self._lock:
            if len(self._tickets) < copies:
                self._look_for_leavers()
            if len(self._tickets) < copies:
                return []
            tickets = [self._tickets.pop() for _ in range(copies)]
            place.tickets += tickets
            place.promised.update(tickets if promised else ())
            for ticket in tickets:
                self._memory[NUM_TICKETS + ticket] = not promised
                self._memory[ticket] = 1
        path, offset = self.announcement.path, _offset(place.first)
        return [PixelFile(path, (frames, height, width, channels), offset, ticket) for ticket in tickets]

    def settle(self, files: Iterable[PixelFile], *, kept: bool) -> None:
        """The pixels of `files`, all that were promised at once, have come; or never will, and the engine is told."""
        with self._lock:
            for file in files:
                place = self._places.get((file.offset - ROOM_HEAD) // PIECE_BYTES)
                if place is not None and file.ticket in place.promised:
                    place.promised.remove(file.ticket)
                    self._memory[NUM_TICKETS + file.ticket] = kept

    def take_back(self, file: PixelFile) -> None:
        """`file` was never said to the engine, nor will it be."""
        self._memory[file.ticket] = 0

    def _place_of(self, pixels: npt.NDArray[np.uint8]) -> _Place | None:
        piece, rest = divmod(address_of(pixels) - self._address - ROOM_HEAD, PIECE_BYTES)
        return self._places.get(piece) if rest == 0 and pixels.flags.c_contiguous else None

    def _look_for_leavers(self) -> None:
        """Tickets that have come back, and places that nobody has any more."""
        for place in list(self._places.values()):
            held = [ticket for ticket in place.tickets if self._memory[ticket] or ticket in place.promised]
            self._tickets += set(place.tickets).difference(held)
            place.tickets = held
            if not held and not place.wanted:
                del self._places[place.first]
                self._taken[place.first : place.first + place.count] = bytes(place.count)


def address_of(array: npt.NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _offset(piece: int) -> int:
    return ROOM_HEAD + piece * PIECE_BYTES
