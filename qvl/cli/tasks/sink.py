"""Where results go: one stream of texts, lines of JSON, or a folder with a file for each. Does not know any task."""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from qvl.errors import InvalidRequest
from qvl.tasks.base import Task
from qvl.tasks.inputs import Item
from qvl.tasks.run import Outcome


def open_sink(output: str | None, found: Sequence[Item], task: Task[Any], *, as_json: bool) -> Sink:
    """The sink for `output` (None is standard output). Raises `InvalidRequest` for an output that is an input."""
    several = len(found) > 1
    path = None if output is None else Path(output).expanduser()
    if output is not None and path is not None and is_folder(output):
        return FolderSink(path, task.suffix, found, as_json=as_json)
    if path is not None:
        keep_inputs(path, found)
    if as_json or (several and task.several == "json"):
        return JsonSink(path)
    return TextSink(path, headings=several and task.several == "headings")


def is_folder(output: str) -> bool:
    """Whether an output that a person named is to hold a file for each input."""
    return output.endswith("/") or Path(output).expanduser().is_dir()


def keep_inputs(path: Path, found: Sequence[Item]) -> None:
    """Raises `InvalidRequest` for an output that is an input."""
    if os.path.realpath(path) in _inputs(found):
        raise InvalidRequest(f"{path} is an input: name another file")


class Sink(ABC):
    """Takes outcomes in order; a context manager around them."""

    @abstractmethod
    def put(self, outcome: Outcome[Any]) -> None:
        """Write it. Raises `InvalidRequest` where that is not possible."""

    def grow(self, text: str) -> None:  # noqa: B027  most sinks write what is whole
        """The text of the only outcome begins with this; `put` follows."""

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:  # noqa: B027  most sinks hold nothing back
        """The last outcome was put."""


class _Stream(Sink):
    """Standard output, or a file that is made when there is something to write."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = sys.stdout if path is None else None

    def write(self, text: str) -> None:
        if self._file is None:
            assert self._path is not None
            self._file = _open(self._path)
        self._file.write(text)
        self._file.flush()

    def close(self) -> None:
        if self._path is not None and self._file is not None:
            self._file.close()


class TextSink(_Stream):
    """Texts one after the other, an empty line between them; with `headings` each below its name, as `head` does."""

    def __init__(self, path: Path | None, *, headings: bool) -> None:
        super().__init__(path)
        self._headings = headings
        self._first = True
        self._grown = ""  # written already, and no line's end yet

    def grow(self, text: str) -> None:
        if text != self._grown and text.startswith(self._grown):
            self.write(text.removeprefix(self._grown))
            self._grown = text

    def put(self, outcome: Outcome[Any]) -> None:
        if outcome.result is None:
            return
        text = outcome.result.text
        whole = text if text.endswith("\n") else f"{text}\n"
        head = f"==> {outcome.item.title} <==\n" if self._headings else ""
        if whole.startswith(self._grown):
            self.write(("" if self._first else "\n") + head + whole.removeprefix(self._grown))
        else:  # the end of the answer changed how its beginning is read
            self.write(f"\n\n{whole}")
        self._first, self._grown = False, ""

    def close(self) -> None:
        if self._grown:  # an error or Ctrl-C is told on a line of its own
            self.write("\n")
        super().close()


class JsonSink(_Stream):
    """A line of JSON for every item, failed ones too."""

    def put(self, outcome: Outcome[Any]) -> None:
        self.write(json.dumps(as_dict(outcome), ensure_ascii=False) + "\n")


class FolderSink(Sink):
    """A file for each item."""

    def __init__(self, folder: Path, suffix: str, found: Sequence[Item], *, as_json: bool) -> None:
        self._names = FileNames(folder, ".json" if as_json else suffix, found)
        self._as_json = as_json

    def put(self, outcome: Outcome[Any]) -> None:
        if outcome.result is None:
            return
        if self._as_json:
            text = json.dumps(as_dict(outcome), ensure_ascii=False, indent=2)
        else:
            text = outcome.result.text
        path = self._names.path(outcome.item)
        with whole(path), _open(path) as file:
            file.write(text if text.endswith("\n") else f"{text}\n")


class FileNames:
    """A file below `folder` for each item, named after it, and never an input; pages of a PDF are numbered."""

    def __init__(self, folder: Path, suffix: str, found: Sequence[Item]) -> None:
        self._folder = folder
        self._suffix = suffix
        self._paged = _paged(found)
        self._taken = _inputs(found)

    def path(self, item: Item) -> Path:
        """Its folder is made. Raises `InvalidRequest` where that is not possible."""
        path = self._folder / self._name(item)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(f"cannot make the folder {path.parent}: {error.strerror}") from error
        return path

    def _name(self, item: Item) -> str:
        """The item's relative name with our suffix; with its own before that where two would be the same."""
        named = PurePosixPath(item.name)
        page = f"-{item.page:03}" if item.file in self._paged else ""
        stem = str(named.with_name(named.stem))
        numbered = (f"{stem}{page}-{n}" for n in count(2))
        for candidate in chain((f"{stem}{page}", f"{item.name}{page}"), numbered):
            name = candidate + self._suffix
            place = os.path.realpath(self._folder / name)
            if place not in self._taken:
                break
        self._taken.add(place)
        return name


def as_dict(outcome: Outcome[Any]) -> dict[str, Any]:
    """An outcome as a program reads it."""
    told: dict[str, Any] = {"file": outcome.item.file, "page": outcome.item.page, "result": None}
    if outcome.result is not None:
        told["result"] = outcome.result.data
        if outcome.result.notes:
            told["notes"] = list(outcome.result.notes)
    if outcome.error is not None:
        told["error"] = {"code": outcome.error.code, "message": outcome.error.message}
    return told


def _paged(found: Sequence[Item]) -> set[str]:
    """Files of which several pages are asked about."""
    pages = Counter(item.file for item in found if item.page is not None)
    return {file for file, times in pages.items() if times > 1}


def _inputs(found: Sequence[Item]) -> set[str]:
    """Where the inputs lie, links followed."""
    return {os.path.realpath(os.path.expanduser(item.file.removeprefix("file://"))) for item in found}


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Around what writes a file: half of one, which a reader might take for all there is, is not left behind.

    Raises `InvalidRequest` where it cannot be written.
    """
    is_new = not path.exists()
    try:
        yield
    except OSError as error:
        if is_new:
            with suppress(OSError):  # there may be no such folder
                path.unlink()
        raise InvalidRequest(f"cannot write {path}: {error.strerror or error}") from error


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}") from error
