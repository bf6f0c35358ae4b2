"""Private folders for sockets and pixels, and what dead processes left of theirs.

A folder belongs to the process that holds a lock on its file `lock`; the kernel drops the lock with the process,
however it died, so that the next start can tell what is stale without trusting process numbers. Knows files, not what
is in them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qvl.engine.protocol import OWN_FILE, PixelFile
from qvl.errors import Overloaded

if TYPE_CHECKING:  # a server's start does not wait for it
    import numpy as np
    import numpy.typing as npt

    from qvl.backends.room import PixelRoom

# Names of pixels that are still to come, and where what came of it is said.
Promise: TypeAlias = "tuple[PixelRoom, list[PixelFile]]"

PREFIX = "qvl-run-"
# A folder this young may be about to be locked by the process that has just made it.
GRACE_SECONDS = 60.0
# Room that is left to others in a memory file system.
SPARE_BYTES = 16 * 1024 * 1024
# Files stay for a picture's next request only where this much is free: not in a container's small /dev/shm.
ROOM_TO_KEEP = 1 << 30
MAX_SOCKET_PATH = 90


class ScratchFolder:
    """A folder of mode 0700 under `base`, removed by `close`, or by a later process when this one was killed."""

    def __init__(self, base: str) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        self._lock: int | None = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder and all that is in it. Safe to call twice."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def remove_stale(base: str) -> list[Path]:
    """Remove this user's folders under `base` whose owner is dead; those that were removed."""
    removed = []
    for folder in Path(base).glob(f"{PREFIX}*"):
        try:
            status = folder.lstat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < GRACE_SECONDS or not _is_free(folder):
                continue
        except OSError:  # somebody else removes it at the same time
            continue
        shutil.rmtree(folder, ignore_errors=True)
        removed.append(folder)
    return removed


def _is_free(folder: Path) -> bool:
    """Whether nobody holds the folder's lock (or it has none)."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def bases() -> list[str]:
    """Where scratch folders go, the best place first: memory if it can be written, then the usual temporary folder."""
    memory = "/dev/shm"
    usual = tempfile.gettempdir()
    return [memory, usual] if os.access(memory, os.W_OK | os.X_OK) else [usual]


def socket_base() -> str:
    """A folder whose path leaves room for a socket's name (the kernel takes 108 bytes)."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) < MAX_SOCKET_PATH - len(PREFIX) - 20 else "/tmp"


class PixelStore:
    """Puts pixels where the engine finds them: into `room`, or into files that it maps and unlinks. Thread-safe.

    A file goes to the first folder that can take it: a container's /dev/shm may hold no more than 64 MiB.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.room: PixelRoom | None = None
        self._folders = folders
        self._names = itertools.count()
        self._kept: dict[int, Path] = {}  # by id() of an array that lives: a name of ours for its file

    def empty(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8] | None:
        """An array that need not be written once more, if there is a place for one."""
        room = self.room
        return None if room is None else room.empty(shape)

    def promise(self, pixels: npt.NDArray[np.uint8], copies: int) -> Promise | None:
        """As `write`, of what an array of `empty` will hold; None where that cannot be."""
        room = self.room
        files = [] if room is None else room.hand_over(pixels, copies, promised=True)
        return (room, files) if room is not None and files else None

    def write(self, pixels: npt.NDArray[np.uint8], copies: int = 1, *, keep: bool = False) -> list[PixelFile]:
        """`copies` names (for one set of bytes) of `pixels`, uint8 [frames, h, w, 3] in C order.

        With `keep` the bytes stay as long as this very array lives, and are not written again for it. Raises
        `Overloaded` when no folder has room.
        """
        if self.room is not None and (places := self.room.hand_over(pixels, copies)):
            return places
        frames, height, width, channels = pixels.shape
        paths = self._linked(pixels, copies) or self._written(pixels, copies)
        if keep:
            self._keep(pixels, paths[0])
        return [PixelFile(str(path), (frames, height, width, channels)) for path in paths]

    def _linked(self, pixels: npt.NDArray[np.uint8], copies: int) -> list[Path]:
        """New names for the bytes that are there; none where they are not."""
        kept = self._kept.get(id(pixels))
        if kept is None:
            return []
        names = [kept.with_name(f"{next(self._names)}.rgb") for _ in range(copies)]
        try:
            for name in names:
                os.link(kept, name)
        except OSError:  # the engine's folders have gone, or the file system takes no more names
            _remove(names)
            return []
        return names

    def _written(self, pixels: npt.NDArray[np.uint8], copies: int) -> list[Path]:
        for folder in self._folders:
            path, *others = (folder / f"{next(self._names)}.rgb" for _ in range(copies))
            try:
                if not _has_room(folder, pixels.nbytes):
                    continue
                path.write_bytes(pixels.data.cast("B"))
                for other in others:
                    os.link(path, other)
            except OSError as error:
                _remove([path, *others])
                if error.errno != errno.ENOSPC:
                    raise
                continue
            return [path, *others]
        raise Overloaded("no room left for the pixels of further pictures; send the request again later", retry_after=2)

    def _keep(self, pixels: npt.NDArray[np.uint8], path: Path) -> None:
        if id(pixels) in self._kept or not _has_room(path.parent, ROOM_TO_KEEP):
            return
        own = path.with_suffix(".kept")
        with contextlib.suppress(OSError):
            os.link(path, own)
            if self._kept.setdefault(id(pixels), own) is not own:  # another thread was faster
                os.unlink(own)
                return
            # Runs before another array can have this id. A lock would not do: it may run within any statement.
            weakref.finalize(pixels, self._forget, id(pixels)).atexit = False

    def _forget(self, number: int) -> None:
        _remove([self._kept.pop(number)])

    def discard(self, files: Iterable[PixelFile]) -> None:
        """Give back what the engine has never heard of, nor will."""
        for file in files:
            if file.ticket == OWN_FILE:
                Path(file.path).unlink(missing_ok=True)
            elif self.room is not None and self.room.announcement.path == file.path:
                self.room.take_back(file)


def _has_room(folder: Path, num_bytes: int) -> bool:
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize >= num_bytes + SPARE_BYTES


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
