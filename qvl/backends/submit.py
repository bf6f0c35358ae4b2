"""From a prepared prompt to the messages that the engine gets: one `AddRequest` per answer, pixels in shared files.

Knows how `n` answers share one prompt. Does not know connections or text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from qvl.backends.base import Observer
from qvl.backends.scratch import PixelStore
from qvl.engine.intake import Prepared
from qvl.engine.protocol import AddRequest, PixelFile


@dataclass(frozen=True, slots=True)
class Submission:
    """A request ready for the engine: `adds[i]` asks for answer i; `files` are all files that were written for it."""

    prepared: Prepared
    adds: tuple[AddRequest, ...]
    files: tuple[PixelFile, ...]


def submission(prepared: Prepared, request_id: str, store: PixelStore, observer: Observer | None) -> Submission:
    """Writes the pixels (one file per picture, one more name of it per further answer).

    Raises `Overloaded` when there is no room for them.
    """
    n = prepared.sampling.n
    files: list[list[PixelFile]] = []
    try:
        for medium in prepared.media:
            started = time.perf_counter()
            # A picture may come again with its pixels still here (media.kept); those of a video never do.
            files.append(store.write(medium.pixels, copies=n, keep=medium.kind == "image"))
            if observer is not None:
                observer.media_stage(medium.kind, "share", time.perf_counter() - started)
        adds = tuple(
            prepared.request(f"{request_id}.{index}", index, [names[index] for names in files]) for index in range(n)
        )
    except BaseException:
        store.discard(_flat(files))
        raise
    return Submission(prepared, adds, tuple(_flat(files)))


def _flat(files: Iterable[Iterable[PixelFile]]) -> list[PixelFile]:
    return [file for names in files for file in names]
