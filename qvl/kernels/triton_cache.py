"""Where Triton keeps what it compiled: its own folder in the user's home, another where there is no such home.

A service's user and a container's often have none, and without a folder Triton compiles nothing. Knows folders. Does
not import Triton, which reads the variable when it looks for a kernel.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from qvl.kernels.native import cache_folder

CHOICES = ("TRITON_CACHE_DIR", "TRITON_HOME")  # a user's word


def settle_cache(environment: MutableMapping[str, str] = os.environ) -> None:
    """Name a folder to Triton if its own cannot be written: this user's alone, because code is loaded from it."""
    if any(environment.get(name) for name in CHOICES) or can_write(Path(os.path.expanduser("~/.triton/cache"))):
        return
    kept = cache_folder()
    folder = Path(tempfile.gettempdir()) / f"qvl-triton-{os.getuid()}" if kept is None else kept / "triton"
    if not (can_write(folder) and is_private(folder)):
        folder = Path(tempfile.mkdtemp(prefix="qvl-triton-"))  # for this process alone: the name is somebody else's
    environment["TRITON_CACHE_DIR"] = str(folder)


def folder_of_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Triton keeps it now."""
    if named := environment.get("TRITON_CACHE_DIR"):
        return Path(named)
    home = environment.get("TRITON_HOME") or os.path.expanduser("~")
    return Path(home, ".triton", "cache")


def can_write(folder: Path) -> bool:
    """Whether it is there, or could be made, and takes files."""
    try:
        if not folder.is_absolute():
            return False  # a user without a name has no home
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except OSError:
        return False


def is_private(folder: Path) -> bool:
    """Whether only this user can write to it."""
    status = folder.lstat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
