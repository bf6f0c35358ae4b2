"""Pictures that come of inputs besides their texts: boxes drawn, pages side by side. Does not know what is on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qvl.cli.tasks.sink import FileNames, Sink, is_folder, keep_inputs, whole
from qvl.errors import InvalidRequest
from qvl.tasks.inputs import Item
from qvl.tasks.pictures import pixels_of
from qvl.tasks.run import Outcome
from qvl.types import MediaPart

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Make = Callable[[Image.Image, Any], Image.Image]


class PictureSink(Sink):
    """Writes what `make` draws of an input's picture and the value that came of it."""

    def __init__(self, output: str, found: Sequence[Item], make: Make) -> None:
        self._make = make
        self._names: FileNames | None = None
        self._path = Path(output).expanduser()
        if is_folder(output):
            self._names = FileNames(self._path, ".png", found)
            return
        if len(found) > 1:
            raise InvalidRequest(f"{len(found)} pictures need a folder, and {output} is none: end its name with /")
        check_name(self._path)
        keep_inputs(self._path, found)

    def put(self, outcome: Outcome[Any]) -> None:
        if outcome.result is None:
            return
        path = self._path if self._names is None else self._names.path(outcome.item)
        if self._names is not None:
            keep_inputs(path, (outcome.item,))
        part = outcome.item.load()
        assert isinstance(part, MediaPart), "only pictures are drawn on"
        save(self._make(Image.fromarray(pixels_of(part)), outcome.result.value), path)


def check_name(path: Path) -> None:
    """Raises `InvalidRequest` for a file that is no picture by its name."""
    if path.suffix.lower() not in SUFFIXES:
        raise InvalidRequest(f"a picture is written as {', '.join(SUFFIXES)}, and not as {path.name}")


def save(picture: Image.Image, path: Path) -> None:
    """Raises `InvalidRequest` where that is not possible; half a picture is not left behind."""
    with whole(path):
        picture.save(path)
