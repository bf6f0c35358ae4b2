"""Where requests come from: lines of a file, or the pictures of a folder, read when their turn comes.

Knows files and folders. A line is bytes here; what stands in it is `lines`' to read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from qvl.client import media_kind
from qvl.errors import InvalidRequest
from qvl.media.folder import PICTURE_SUFFIXES, files_below


@dataclass(frozen=True, slots=True)
class RawLine:
    """One request as it was found. `offset` is what `Source.read` wants; `stamp` changes with what the line names."""

    number: int
    offset: int
    data: bytes
    stamp: bytes = b""


class Source(Protocol):
    """`name` is for people; relative picture paths in lines start at `base`.

    `whole`: the lines' bytes alone decide what is asked, so that a line can be checked again when its turn comes.
    `skipped` says for people what `scan` left out and why; it is empty when that was nothing.
    """

    name: str
    base: Path
    whole: bool
    skipped: str

    def scan(self) -> Iterator[RawLine]:
        """Every line in order; blank ones are left out. Raises `InvalidRequest` when there is nothing to read."""

    def read(self, offset: int) -> bytes:
        """The line at an offset that `scan` told. May be called from several threads."""


class JsonLines:
    """A file with one JSON object a line."""

    whole = True
    skipped = ""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.base = path.resolve().parent
        try:
            self._file = open(path, "rb")  # noqa: SIM115  lives as long as this object
        except OSError as error:
            raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
        if not os.path.isfile(path):
            raise InvalidRequest(f"{path} is no plain file: a batch is read twice, and again when it is resumed")

    def scan(self) -> Iterator[RawLine]:
        self._file.seek(0)
        offset = 3 if self._file.read(3) == b"\xef\xbb\xbf" else 0
        self._file.seek(offset)
        for number, line in enumerate(self._file, 1):
            data = line.strip()
            if data:
                yield RawLine(number, offset, data)
            offset += len(line)

    def read(self, offset: int) -> bytes:
        pieces: list[bytes] = []
        size = 1 << 14
        while piece := os.pread(self._file.fileno(), size, offset):
            end = piece.find(b"\n")
            pieces.append(piece if end < 0 else piece[:end])
            if end >= 0:
                break
            offset += len(piece)
            size = min(2 * size, 1 << 24)
        return b"".join(pieces).strip()


class Pictures:
    """The pictures below a folder, by name, each asked about with the same `prompt`.

    `fields` are further fields of every body. Hidden files and folders are left out, and names that are not UTF-8:
    neither a request nor an answer can spell them.
    """

    whole = False  # the pictures behind the lines may change

    def __init__(self, folder: Path, prompt: str, fields: Mapping[str, Any]) -> None:
        self.name = str(folder)
        self.base = folder.resolve()
        self._prompt = prompt
        self._fields = dict(fields)
        self.skipped = ""
        self._names = bytearray()  # all names, each with a zero byte behind it: far smaller than a list of texts

    def scan(self) -> Iterator[RawLine]:
        self._names.clear()
        number = 0
        unspeakable: list[str] = []
        for name in files_below(str(self.base), PICTURE_SUFFIXES):
            offset = len(self._names)
            try:
                self._names += name.encode() + b"\0"
            except UnicodeEncodeError:
                unspeakable.append(name)
                continue
            number += 1
            status = os.stat(self.base / name)
            yield RawLine(number, offset, self.read(offset), f"{status.st_size} {status.st_mtime_ns}".encode())
        self.skipped = _skipped(unspeakable, self.name)
        if unspeakable and not number:
            raise InvalidRequest(self.skipped)

    def read(self, offset: int) -> bytes:
        name = self._names[offset : self._names.index(0, offset)].decode()
        kind = f"{media_kind(name)}_url"
        content = [{"type": kind, kind: {"url": name}}, {"type": "text", "text": self._prompt}]
        body = {**self._fields, "messages": [{"role": "user", "content": content}]}
        return msgspec.json.encode({"custom_id": name, "body": body})


def _skipped(names: list[str], folder: str) -> str:
    """What is said of files whose names are not UTF-8; the first one is shown with its odd bytes escaped."""
    if not names:
        return ""
    first = os.fsencode(names[0]).decode("utf-8", "backslashreplace")
    if len(names) == 1:
        return f"'{first}' in {folder} is skipped: its name is not UTF-8; rename it, and --resume asks about it"
    return (
        f"{len(names)} files in {folder} are skipped: their names are not UTF-8, such as '{first}'; "
        "rename them, and --resume asks about them"
    )
