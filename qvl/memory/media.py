"""Pictures and videos of stored turns: what is kept of a source, and how it stands in a row.

Bytes are kept once, under their digest; a file above the cap stays where it is and is named; an address is an address.
Knows what a `MediaPart.source` may be. Does not know SQL, and decodes nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image

from qvl.errors import BadMedia, InvalidRequest, PayloadTooLarge
from qvl.types import MediaPart, Message, Part, PixelLimits, TextPart

_DIGEST_BYTES = 16
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Keep:
    """How many bytes of pictures and videos a store keeps: of one, and of all together.

    What is above stays outside: a file is remembered by its path (and is lost if the file goes), anything else is
    refused with `PayloadTooLarge`.
    """

    one: int = 64 << 20
    all: int = 4 << 30


@dataclass(frozen=True, slots=True)
class StoredMedia:
    """Stands as `MediaPart.source` for something in a store, until `Store.resolve` puts the real one there."""

    digest: str


@dataclass(frozen=True, slots=True)
class Kept:
    """One row: where the picture is, as its bytes, a path (absolute) or an address; the first that is there counts."""

    digest: str
    num_bytes: int
    data: bytes | None = None
    path: str | None = None
    url: str | None = None

    @property
    def source(self) -> bytes | str | Path:
        """What goes into a `MediaPart`."""
        if self.data is not None:
            return self.data
        return self.url if self.url is not None else Path(self.path or "")


def media_key(source: Any) -> str:
    """The same for the same picture, however often it is given: a digest of its bytes, or of its address.

    A file counts as the same while its size and time of change are. Raises `InvalidRequest` where there is no file.
    """
    if isinstance(source, StoredMedia):
        return source.digest
    if isinstance(source, list | tuple):
        return _digest("\n".join(media_key(frame) for frame in source).encode())
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return _digest(source.encode())
    if isinstance(source, str | Path):
        path = _path(source)
        with _file_errors(path):
            facts = path.stat()
        return _digest(f"{path}\n{facts.st_size}\n{facts.st_mtime_ns}".encode())
    if isinstance(source, Image.Image):
        return _digest(f"{source.mode} {source.size}\n".encode() + source.tobytes())
    if isinstance(source, np.ndarray):
        return _digest(f"{source.dtype} {source.shape}\n".encode() + source.tobytes())
    return _digest(_bytes(source))


def keep_media(source: Any, rule: Keep, room: int) -> Kept:
    """What the store keeps of one picture or video file. `room`: bytes left under `rule.all`.

    Raises `InvalidRequest` for a file that cannot be read, `BadMedia` for what is no source, `PayloadTooLarge`.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        return Kept(_digest(source.encode()), 0, url=source)
    if isinstance(source, str | Path) and not str(source).startswith("data:"):
        return _keep_file(_path(source), min(rule.one, room))
    data = _bytes(source)
    if len(data) > min(rule.one, room):
        raise PayloadTooLarge(
            f"a picture or video of {len(data)} bytes is above what the store keeps ({rule.one} each, {rule.all} "
            f"together): give it as a file, forget old conversations, or raise the cap",
            param="messages",
        )
    return Kept(_digest(data), len(data), data=data)


def _keep_file(path: Path, cap: int) -> Kept:
    with _file_errors(path):
        size = path.stat().st_size
        if size <= cap:
            data = path.read_bytes()
            return Kept(_digest(data), len(data), data=data, path=str(path))
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        with path.open("rb") as file:
            while piece := file.read(_CHUNK):
                state.update(piece)
        return Kept(state.hexdigest(), size, path=str(path))


def write_parts(message: Message, keep: Callable[[Any], str]) -> str:
    """The JSON of a message's parts; `keep` stores one source and returns its digest."""
    return json.dumps([_write_part(part, keep) for part in message.parts], ensure_ascii=False)


def _write_part(part: Part, keep: Callable[[Any], str]) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    written: dict[str, Any] = {"type": part.kind}
    if isinstance(part.source, list | tuple) or getattr(part.source, "ndim", 0) == 4:
        written["frames"] = [keep(frame) for frame in part.source]
    else:
        written["media"] = keep(part.source)
    limits = {name: value for name, value in asdict(part.limits).items() if value is not None}
    return {**written, "limits": limits} if limits else written


def read_parts(text: str) -> tuple[Part, ...]:
    """The parts of a row; pictures as `StoredMedia`."""
    return tuple(map(_read_part, json.loads(text)))


def _read_part(part: Mapping[str, Any]) -> Part:
    if part["type"] == "text":
        return TextPart(part["text"])
    source: Any = tuple(map(StoredMedia, part["frames"])) if "frames" in part else StoredMedia(part["media"])
    return MediaPart(part["type"], source, PixelLimits(**part.get("limits", {})))


def digests_of(message: Message) -> Iterator[str]:
    """The digests of a message that came out of a store."""
    for part in message.parts:
        if isinstance(part, MediaPart):
            frames = part.source if isinstance(part.source, tuple) else (part.source,)
            yield from (frame.digest for frame in frames if isinstance(frame, StoredMedia))


def _bytes(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        return _from_data_url(source)
    if isinstance(source, Image.Image | np.ndarray):
        return _as_png(source)
    raise BadMedia(
        "a picture is given as a URL, a data URL, a path, bytes, a PIL picture or a uint8 array [h, w, 3]",
        param="messages",
    )


def _from_data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if comma:
            return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except binascii.Error as error:
        raise BadMedia(f"a data URL holds bad base64: {error}", param="messages") from error
    raise BadMedia("a data URL has no comma", param="messages")


def _as_png(picture: Any) -> bytes:
    """Pixels as PNG, which loses nothing. Raises `BadMedia` for what is no picture."""
    buffer = io.BytesIO()
    try:
        (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, "PNG")
    except (TypeError, ValueError, OSError) as error:
        raise BadMedia(f"pixels that cannot be kept as a picture: {error}", param="messages") from error
    return buffer.getvalue()


def _path(source: str | Path) -> Path:
    return Path(os.path.expanduser(str(source).removeprefix("file://"))).absolute()


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """An `OSError` in the words of whoever named the file."""
    try:
        yield
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}", param="messages") from error


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()
