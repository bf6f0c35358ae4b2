"""From what a person named (files, folders, addresses, "-", objects of a program) to items, each asked about once.

    items(["scans/", "report.pdf", ...], reading) -> [Item("scans/1.png"), ..., Item("report.pdf", page=1), ...]

What cannot be read becomes an item too, whose `load` raises: one bad file does not lose the others. Pictures are not
decoded here: whoever answers does, and says what is wrong with one. Knows no task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qvl.client import media_kind, screen_part
from qvl.errors import InvalidRequest, QvlError
from qvl.media.fetch import MediaPolicy, read
from qvl.media.folder import PICTURE_SUFFIXES, files_below
from qvl.tasks import pdf
from qvl.tasks.base import Kind
from qvl.types import MediaPart, Part, TextPart

STDIN = "-"
TEXT_SUFFIXES = (".txt", ".md")
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
_HEAD_BYTES = 1024
# The person's own machine asks: what it may reach, it may reach.
_POLICY = MediaPolicy(allow_private_hosts=True, allow_any_local_path=True)
_NOUNS = {"image": "pictures", "video": "videos", "text": "text"}


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to ask about. `file` is what the person called it, `page` counts from 1 in a PDF, None elsewhere.

    `load` reads it, in whichever thread asks; it raises `QvlError`s. `name` is a relative path for what comes of it.
    `error` is what is known already to keep it from being read.
    """

    file: str
    load: Callable[[], Part] = field(compare=False)
    page: int | None = None
    name: str = ""
    error: QvlError | None = None

    @classmethod
    def unreadable(cls, file: str, name: str, error: QvlError) -> Item:
        def load() -> Part:
            raise error

        return cls(file, load, None, name, error)

    @property
    def title(self) -> str:
        return self.file if self.page is None else f"{self.file}, page {self.page}"


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages of a PDF that are wanted, from 1: pairs of first and last; None as last is the end."""

    ranges: tuple[tuple[int, int | None], ...] = ((1, None),)

    @classmethod
    def parse(cls, text: str) -> Pages:
        """From "1-3,7,9-". Raises `InvalidRequest`."""
        return cls(tuple(_range(piece.strip(), text) for piece in text.split(",")))

    def of(self, count: int) -> list[int]:
        """Those that a document of `count` pages has, each once and in order."""
        wanted = {n for first, last in self.ranges for n in range(first, min(last or count, count) + 1)}
        return sorted(wanted)


def _range(piece: str, whole: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"(\d{1,6})(-(\d{1,6})?)?", piece)
    if match is None or int(match[1]) < 1 or (match[3] and int(match[3]) < int(match[1])):
        raise InvalidRequest(f"'{whole}' names no pages; write --pages 1-3 or --pages 2,5,8-")
    first = int(match[1])
    return first, first if match[2] is None else int(match[3]) if match[3] else None


@dataclass(frozen=True, slots=True)
class Reading:
    """How inputs are read: which kinds the task takes, which pages of PDFs, and how large these are drawn (asked when
    the first is)."""

    accepts: Collection[Kind] = frozenset[Kind]({"image"})
    pages: Pages | None = None
    resolution: Callable[[], pdf.Resolution] = pdf.Resolution
    stdin: Callable[[], bytes] = lambda: b""


def items(sources: Iterable[Any], reading: Reading) -> list[Item]:
    """What is to be asked about, in the order of naming; folders in the order of their files' names.

    A source is a path, an address, "-", "screen:", bytes of a file, a PIL picture, an array, or a `MediaPart`. Raises
    `InvalidRequest` for wishes that fit nothing, such as pages of what is no PDF.
    """
    found = [item for source in sources for item in _items(source, reading)]
    if reading.pages is not None and found and not any(item.page or item.error for item in found):
        raise InvalidRequest("--pages is for PDFs, and there is none")
    return found


def _items(source: Any, reading: Reading) -> Iterator[Item]:
    named = source if isinstance(source, str) else str(source) if isinstance(source, Path) else ""
    try:
        if not named:
            yield from _held(source, reading)
        elif named == STDIN:
            yield from _bytes(STDIN, "stdin", reading.stdin(), reading)
        elif (screen := screen_part(named)) is not None:
            yield from _held(screen, reading, named)
        elif "://" in named or named.startswith("data:"):
            yield from _address(named, reading)
        else:
            yield from _path(named, reading)
    except QvlError as error:
        yield Item.unreadable(_shown(named) if named else "(picture)", _name_of(named), error)


def _held(source: Any, reading: Reading, named: str = "(picture)") -> Iterator[Item]:
    """What a program holds."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield from _bytes("(bytes)", "picture", bytes(source), reading)
        return
    if isinstance(source, list | tuple):
        raise InvalidRequest("a list is not one picture: take what it holds with qvl.tasks.each")
    part = source if isinstance(source, MediaPart | TextPart) else MediaPart("image", source)
    _check_kind(part.kind if isinstance(part, MediaPart) else "text", reading.accepts)
    yield Item(named, lambda: part, name="picture")


def _path(named: str, reading: Reading) -> Iterator[Item]:
    path = Path(named.removeprefix("file://")).expanduser()
    if path.is_dir():
        below = list(files_below(str(path), _suffixes(reading.accepts)))
        if not below:
            raise InvalidRequest(f"no {_nouns(reading.accepts)} in the folder {named}")
        for name in below:
            try:
                yield from _file(f"{named.rstrip('/')}/{name}", path / name, name, reading)
            except QvlError as error:
                yield Item.unreadable(f"{named.rstrip('/')}/{name}", name, error)
        return
    yield from _file(named, path, path.name, reading)


def _file(file: str, path: Path, name: str, reading: Reading) -> Iterator[Item]:
    try:
        with path.open("rb") as opened:
            head = opened.read(_HEAD_BYTES)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise InvalidRequest(f"{reason}: {file}") from None
    if pdf.is_pdf(head):
        yield from _pages(file, name, path, reading)
    elif name.lower().endswith(TEXT_SUFFIXES):
        _check_kind("text", reading.accepts, file)
        yield Item(file, lambda: TextPart(_text_of(path, file)), name=name)
    else:
        kind = media_kind(path)
        _check_kind(kind, reading.accepts, file)
        yield Item(file, lambda: MediaPart(kind, path), name=name)


def _address(address: str, reading: Reading) -> Iterator[Item]:
    """What stands behind an address is fetched here, so that any server can be asked about it: in its turn where its
    name tells that it is a picture, else at once, to see what it is."""
    shown = _shown(address)
    kind = media_kind(address)
    if kind == "video":
        _check_kind(kind, reading.accepts, shown)
        yield Item(shown, lambda: MediaPart("video", read(address, _POLICY, expect="video")), name=_name_of(address))
        return
    if re.split(r"[?#]", address)[0].lower().endswith(PICTURE_SUFFIXES):
        yield Item(shown, lambda: MediaPart("image", read(address, _POLICY, expect="image")), name=_name_of(address))
    else:
        yield from _bytes(shown, _name_of(address), read(address, _POLICY, expect="image"), reading)


def _shown(source: str) -> str:
    """What a person called it, but not a whole picture."""
    is_address = source.startswith("data:") or "://" in source
    return f"{source[:60]}..." if is_address and len(source) >= 200 else source


def _bytes(file: str, name: str, data: bytes, reading: Reading) -> Iterator[Item]:
    if not data:
        raise InvalidRequest("standard input is empty" if file == STDIN else f"{file} is empty")
    if pdf.is_pdf(data):
        yield from _pages(file, name, data, reading)
    elif "text" in reading.accepts and (text := _text(data)) is not None:
        yield Item(file, lambda: TextPart(text), name=name)
    else:
        kind: Kind = "video" if data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3" else "image"
        _check_kind(kind, reading.accepts, file)
        yield Item(file, lambda: MediaPart("video" if kind == "video" else "image", data), name=name)


def _pages(file: str, name: str, source: Path | bytes, reading: Reading) -> Iterator[Item]:
    _check_kind("image", reading.accepts, file)
    for number in _wanted(pdf.num_pages(source), reading):
        yield Item(file, partial(_drawn, source, number, reading.resolution), number, name)


def _drawn(source: Path | bytes, number: int, resolution: Callable[[], pdf.Resolution]) -> Part:
    return MediaPart("image", pdf.draw_page(source, number, resolution()))


def _wanted(count: int, reading: Reading) -> list[int]:
    wanted = (reading.pages or Pages()).of(count)
    if not wanted:
        raise InvalidRequest(f"none of the wanted pages: the PDF has {count} page{'s' if count > 1 else ''}")
    return wanted


def _check_kind(kind: Kind, accepts: Collection[Kind], file: str = "this") -> None:
    if kind not in accepts:
        told = {"video": "a video", "image": "a picture", "text": "text"}[kind]
        raise InvalidRequest(f"{file} is {told}, and this task takes {_nouns(accepts)}")


def _nouns(accepts: Collection[Kind]) -> str:
    return " and ".join(noun for kind, noun in _NOUNS.items() if kind in accepts) + " and PDFs" * ("image" in accepts)


def _suffixes(accepts: Collection[Kind]) -> tuple[str, ...]:
    images = (*PICTURE_SUFFIXES, ".pdf") if "image" in accepts else ()
    return (*images, *(VIDEO_SUFFIXES if "video" in accepts else ()))


def _text(data: bytes) -> str | None:
    """The text in bytes that are text; control characters are a sign that they are not."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if re.search(r"[\x00-\x08\x0e-\x1a]", text) else text


def _text_of(path: Path, file: str) -> str:
    try:
        text = _text(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"cannot be read: {error.strerror}: {file}") from None
    if text is None:
        raise InvalidRequest(f"{file} is not text in UTF-8")
    return text


def _name_of(address: str) -> str:
    """The last part of an address, as a name for a file."""
    last = re.split(r"[?#]", address)[0].rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^\w.-]+", "_", last)[:100].strip("._") or "picture"


def one_part(source: Any, reading: Reading) -> Part:
    """The part for a function that takes one thing. Raises `InvalidRequest` where `source` names several."""
    found = items([source], reading)
    if len(found) != 1:
        raise InvalidRequest(
            f"{source} holds {len(found)} pictures: name a page=, or take all of them with qvl.tasks.each"
        )
    return found[0].load()
