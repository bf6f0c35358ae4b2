"""From a prepared prompt to the messages that the engine gets: one `AddRequest` per answer, pixels in shared files.

Knows how `n` answers share one prompt. Does not know connections or text.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qvl.backends.base import Observer
from qvl.backends.scratch import PixelStore, Promise
from qvl.engine.intake import Intake, Prepared
from qvl.engine.protocol import AddRequest, PixelFile
from qvl.media.load import LoadedMedia


@dataclass(frozen=True, slots=True)
class Submission:
    """A request ready for the engine: `adds[i]` asks for answer i; `files` are all files that were written for it.

    `promises[i]`: those of `prepared.media[i]` whose pixels are still to come, and the room where they are awaited.
    """

    prepared: Prepared
    adds: tuple[AddRequest, ...]
    files: tuple[PixelFile, ...]
    promises: Mapping[int, Promise]

    def keep_promises(self, intake: Intake) -> None:
        """Once the engine can have the request: it waits for nothing but pixels then. Raises what decoding does."""

        def keep(number: int) -> None:
            if number in self.promises:
                room, files = self.promises[number]
                room.settle(files, kept=True)

        try:
            intake.finish(self.prepared.media, keep)
        finally:  # tickets of what will never come can be used again once the engine has let go of them
            for room, files in self.promises.values():
                room.settle(files, kept=False)


def submission(prepared: Prepared, request_id: str, store: PixelStore, observer: Observer | None) -> Submission:
    """Finds a place for the pixels (one per picture, with one more name for each further answer), and writes them.

    Those that are still to be decoded are promised. Raises `Overloaded` when there is no room for them.
    """
    n = prepared.sampling.n
    files: list[list[PixelFile]] = []
    promises: dict[int, Promise] = {}
    try:
        for number, medium in enumerate(prepared.media):
            started = time.perf_counter()
            promise = _promise(medium, store, n)
            if promise is None:
                # A picture may come again with its pixels still here (media.kept); those of a video never do.
                files.append(store.write(medium.pixels, copies=n, keep=medium.kind == "image"))
            else:
                promises[number] = promise
                files.append(promise[1])
            if observer is not None:
                observer.media_stage(medium.kind, "share", time.perf_counter() - started)
        adds = tuple(
            prepared.request(f"{request_id}.{index}", index, [names[index] for names in files]) for index in range(n)
        )
        return Submission(prepared, adds, tuple(_flat(files)), promises)
    except BaseException:
        for room, promised in promises.values():
            room.settle(promised, kept=False)
        store.discard(_flat(files))
        raise


def _promise(medium: LoadedMedia, store: PixelStore, copies: int) -> Promise | None:
    """None where the pixels are there."""
    if medium.decoding is None or medium.decoding.is_over:
        return None
    promise = store.promise(medium.pixels, copies)
    if promise is None:  # its place is in an older room, or all tickets are taken
        medium.decoding.finish()
    return promise


def _flat(files: Iterable[Iterable[PixelFile]]) -> list[PixelFile]:
    return [file for names in files for file in names]
