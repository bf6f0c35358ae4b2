"""Which files of a folder are pictures, and in which order. Knows names only; no file is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator

PICTURE_SUFFIXES = (".bmp", ".gif", ".j2k", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def files_below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Relative names with slashes, folder by folder, sorted: the same order on every machine. Hidden ones are left
    out."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(here, folder).replace(os.sep, "/")
        prefix = "" if inside == "." else f"{inside}/"
        for name in sorted(files):
            if name.lower().endswith(suffixes) and not name.startswith("."):
                yield prefix + name
