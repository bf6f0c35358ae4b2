"""Pictures and videos as a program holds them, made into addresses that mean the same on another machine.

A large local picture is sent as the model will see it, where the server says how that is: resized by the very code
that the server would use, so the answer is the same. An address (URL) stays an address. Knows no server and no socket.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import mimetypes
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from qvl.errors import InvalidRequest, QvlError
from qvl.types import MediaKind, MediaPart, Part, PictureRule, PixelLimits, TextPart

REDUCE_ABOVE = 32 * 1024  # bytes of a file; below that there is nothing to win

_VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))


def media_kind(source: Any) -> MediaKind:
    """What a file or address most likely holds, by its name; anything without a telling name counts as a picture."""
    if not isinstance(source, str | Path):
        return "image"
    text = str(source)
    if text.startswith("data:"):
        return "video" if text.startswith("data:video/") else "image"
    path = urlsplit(text).path if "://" in text else text
    return "video" if path.lower().endswith(_VIDEO_SUFFIXES) else "image"


def media_part(item: Any) -> MediaPart:
    """A part for anything that names or holds a picture or video."""
    return item if isinstance(item, MediaPart) else MediaPart(media_kind(item), item)


def is_local_picture(part: Part) -> bool:
    """Whether a part holds a picture of this machine, which might be sent reduced."""
    return isinstance(part, MediaPart) and part.kind == "image" and not _is_address(part.source)


def portable(part: Part, rule: PictureRule | None, limits: PixelLimits) -> Part:
    """The same part; a picture or video as URLs that mean the same on another machine.

    With the server's `rule` a local picture is reduced to what the model will see, where that makes it smaller;
    `limits` are the request's, for what the part's own leave open. Raises `InvalidRequest` for unreadable files.
    """
    if isinstance(part, TextPart):
        return part
    if part.kind == "video" and isinstance(part.source, list | tuple):
        return dataclasses.replace(part, source=tuple(_as_url(frame, "image") for frame in part.source))
    if rule is not None and is_local_picture(part):
        return dataclasses.replace(part, source=_reduced(part.source, rule, part.limits.over(limits)))
    return dataclasses.replace(part, source=_as_url(part.source, part.kind))


def _reduced(source: Any, rule: PictureRule, limits: PixelLimits) -> str:
    """A local picture as the model will see it, as PNG, where that is smaller; else as it is."""
    name, data = None, source
    if isinstance(source, str | Path):
        path = _path(source)
        name, data = path.name, _read(path)
    is_file = isinstance(data, bytes | bytearray | memoryview)
    whole = len(bytes(data)) if is_file else None
    if whole is None or whole > REDUCE_ABOVE:
        png = _seen_by_model(bytes(data) if is_file else data, rule, limits)
        if png is not None and (whole is None or len(png) < whole):
            return _data_url(png, "image/png", "image")
    return _as_url(data, "image") if name is None else _file_url(bytes(data), name, "image")


def _seen_by_model(picture: Any, rule: PictureRule, limits: PixelLimits) -> bytes | None:
    """PNG of the picture at the model's size; None where it is not larger, or where the server must judge it."""
    from qvl.media.fetch import MediaPolicy  # only who sends large pictures pays for decoders
    from qvl.media.image import decode_image
    from qvl.media.resize import resize_bicubic
    from qvl.media.sizes import picture_size

    try:
        pixels = decode_image(picture, max_pixels=MediaPolicy().max_image_pixels)
        height, width = picture_size(pixels.shape[0], pixels.shape[1], rule, limits)
        if height * width >= pixels.shape[0] * pixels.shape[1]:
            return None
        if picture_size(height, width, rule, limits) != (height, width):
            return None  # very thin pictures: the server would resize what we resized
    except (QvlError, TypeError):
        return None  # not a picture, or wishes that cannot be: the server says so in its own words
    return _png(resize_bicubic(pixels, height, width))


def _is_address(source: Any) -> bool:
    return isinstance(source, str) and source.lower().startswith(("http://", "https://", "data:"))


def _as_url(source: Any, kind: MediaKind) -> str:
    if _is_address(source):
        return str(source)
    if isinstance(source, str | Path):
        path = _path(source)
        return _file_url(_read(path), path.name, kind)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _data_url(data, next((mime for magic, mime in _MAGIC if data.startswith(magic)), None), kind)
    return _data_url(_png(source), "image/png", "image")


def _path(source: str | Path) -> Path:
    return Path(os.path.expanduser(str(source).removeprefix("file://")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error


def _png(source: Any) -> bytes:
    """A PIL picture or a uint8 array [h, w, 3] as PNG, which loses nothing."""
    from PIL import Image  # only programs that hold pictures in memory pay for it

    picture = source if isinstance(source, Image.Image) else Image.fromarray(source)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _file_url(data: bytes, name: str, kind: MediaKind) -> str:
    return _data_url(data, mimetypes.guess_type(name)[0], kind)


def _data_url(data: bytes, mime: str | None, kind: MediaKind) -> str:
    known = mime is not None and (mime.startswith(f"{kind}/") or mime == "image/gif")
    return f"data:{mime if known else 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"
