"""From what a caller named (address, data URL, path, bytes) to the bytes of a file, within the server's policy.

Knows what may be read and how much of it. Does not know pictures: bytes are not looked at. No error text carries
an address or a path, since what a server can reach is not for its callers to learn.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, unquote_to_bytes

import msgspec

from qvl.errors import BadMedia, MediaRefused, PayloadTooLarge
from qvl.media.stages import stage
from qvl.types import MediaKind

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
# How PNG, JPEG, GIF, WebP and MP4 files begin in base64, and go on without a dot longer than names of files are.
_BARE_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|R0lGOD|UklGR|AAAA)[A-Za-z0-9+/\s]{256}")
_WHITESPACE = {ord(char): None for char in "\t\n\f\r "}
_BASE64_SLICE = 1 << 20  # a multiple of 4: no character of the code is cut
_base64 = msgspec.json.Decoder(bytes)  # four times as fast as the standard library's, and as strict as can be
_FRAME_LIST = "data:video/jpeg;base64,"


@dataclass(frozen=True, slots=True)
class MediaPolicy:
    """What may be read on behalf of a caller. Times in seconds; sizes of one picture or video.

    `max_bytes` caps files (after any HTTP compression), `max_image_pixels` a picture and `max_frame_pixels` a video
    frame before decoding. A video is decoded in full to find its sampled frames: `max_video_frames` and
    `max_video_pixels` (frames x area) cap that work, `max_video_bytes` the sampled frames as kept (uint8 RGB).
    """

    allow_private_hosts: bool = False
    allowed_local_path: Path | None = None
    allow_any_local_path: bool = False  # in-process use: the caller could open the file anyway
    max_bytes: int = 128 << 20
    max_image_pixels: int = 178_956_970  # where Pillow itself stops
    max_frame_pixels: int = 36_000_000  # 8K and a little
    max_video_frames: int = 120_000
    max_video_pixels: int = 250_000_000_000  # an hour of 1080p at 30 frames a second
    max_video_bytes: int = 1 << 30
    connect_timeout: float = 5.0
    read_timeout: float = 10.0
    total_timeout: float = 60.0


@stage("fetch")
def read(
    source: str | bytes | bytearray | memoryview | Path,
    policy: MediaPolicy,
    *,
    expect: MediaKind,
    seconds: float | None = None,
) -> bytes:
    """The bytes behind `source`: an http(s) URL, a data URL, a file URL, a path, or the bytes themselves.

    `seconds` shortens the policy's total time-out. Raises MediaRefused (policy), PayloadTooLarge, BadMedia
    (cannot be had).
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _capped(bytes(source), policy)
    if isinstance(source, Path):
        return _read_path(str(source), policy)
    match = _SCHEME.match(source)
    scheme, slashes = (match[1].lower(), match[2]) if match else ("", None)
    if scheme == "data":
        return _read_data_url(source, policy, expect)
    if scheme in ("http", "https"):
        from qvl.media.http import read_http  # the HTTP stack loads when it is first needed

        return read_http(source, policy, seconds)
    if scheme == "file" and slashes:
        return _read_path(_file_url_path(source), policy)
    if slashes:
        raise MediaRefused("only http, https, data and file URLs can be read")
    if not source.strip():
        raise BadMedia("its address is empty")
    if _BARE_BASE64.match(source):
        raise BadMedia("base64 alone does not say what it is; send it as a data URL: data:image/png;base64,...")
    return _read_path(source, policy)


def is_remote(source: object) -> bool:
    """Whether `source` is an address on the network."""
    match = _SCHEME.match(source) if isinstance(source, str) else None
    return match is not None and match[1].lower() in ("http", "https")


def is_frame_list(source: object) -> bool:
    """Whether `source` is a video written as `data:video/jpeg;base64,FRAME,FRAME,...`."""
    return isinstance(source, str) and source[: len(_FRAME_LIST)].lower() == _FRAME_LIST


def read_frame_list(source: str, policy: MediaPolicy, *, max_frames: int) -> list[bytes]:
    """The JPEG files of such a video. The count is checked before anything is decoded."""
    _, _, payload = source.partition(",")
    count = payload.count(",") + 1
    if count > max_frames:
        raise BadMedia(f"the video has {count} frames, at most {max_frames} can be taken")
    _check_bytes(len(payload) * 3 // 4, policy)
    return [_from_base64(frame) for frame in payload.split(",")]


def _check_bytes(count: int, policy: MediaPolicy) -> None:
    if count > policy.max_bytes:
        raise PayloadTooLarge(f"a picture or video may have at most {policy.max_bytes} bytes")


def _capped(data: bytes, policy: MediaPolicy) -> bytes:
    _check_bytes(len(data), policy)
    return data


def _read_data_url(url: str, policy: MediaPolicy, expect: MediaKind) -> bytes:
    comma = url.find(",", 0, 1024)
    if comma < 0:
        raise BadMedia("the data URL has no comma between its media type and its data")
    media_type, *parameters = url[len("data:") : comma].lower().replace(" ", "").split(";")
    family = media_type.partition("/")[0]
    if media_type.startswith("image/svg"):
        raise BadMedia("SVG drawings have no pixels; send PNG, JPEG, WebP or GIF")
    is_base64 = "base64" in parameters
    unknown = media_type == "application/octet-stream" or (is_base64 and not media_type)
    # An animated GIF is a picture file that may serve as a video.
    if not unknown and family != expect and (expect, media_type) != ("video", "image/gif"):
        raise BadMedia(f"the data URL should have a media type of {expect}/..., and has {media_type[:80] or 'none'}")
    if not is_base64:
        _check_bytes(len(url) - comma - 1, policy)
        if _BARE_BASE64.match(url, comma + 1):
            raise BadMedia(f"the data is base64, which the data URL should say: data:{media_type[:80]};base64,...")
        return unquote_to_bytes(url[comma + 1 :])
    _check_bytes((len(url) - comma - 1) * 3 // 4, policy)
    return _from_base64(url[comma + 1 :])


def _from_base64(text: str) -> bytes:
    """Strict: only the standard alphabet with its padding; line breaks and percent-encoding are taken off first."""
    try:
        return _decoded(text)
    except ValueError:  # few have something to take off: looking for it takes as long as decoding does
        pass
    try:
        text = unquote(text) if "%" in text else text
        return _decoded(text.translate(_WHITESPACE))
    except ValueError:
        raise BadMedia("the data URL is not valid base64") from None


def _decoded(text: str) -> bytes:
    raw = text.encode("ascii")
    if b"\\" in raw:  # JSON would take it for an escape
        raise ValueError("not of the alphabet")
    return b"".join(_decoded_slices(raw))


def _decoded_slices(raw: bytes) -> Iterator[bytes]:
    """In slices of a millisecond or two: the decoder keeps the interpreter's lock, and others want it in between."""
    for start in range(0, len(raw), _BASE64_SLICE):
        data = _base64.decode(b'"%b"' % raw[start : start + _BASE64_SLICE])
        if start + _BASE64_SLICE < len(raw) and len(data) < _BASE64_SLICE // 4 * 3:
            raise ValueError("padding before the end")
        yield data


def _file_url_path(url: str) -> str:
    """The path in file:///path or file://localhost/path."""
    host, _, path = url[len("file://") :].partition("/")
    if host.lower() not in ("", "localhost"):
        raise MediaRefused("a file URL names a file on the server itself: file:///folder/picture.png")
    return "/" + unquote(path)


def _read_path(path: str, policy: MediaPolicy) -> bytes:
    """A regular file that policy allows. What is missing and what is forbidden look the same from outside."""
    root = policy.allowed_local_path
    if policy.allow_any_local_path:
        return _read_own_path(path, policy)
    if root is None:
        raise MediaRefused(
            "this server reads no local files; send a URL or a data URL (or start it with --allowed-local-media-path)"
        )
    refusal = MediaRefused("no readable file under the folder that --allowed-local-media-path names")
    try:
        folder = root.resolve(strict=True)
        file = (folder / path).resolve(strict=True)  # symlinks and .. are gone from here on
        if not file.is_relative_to(folder):
            raise refusal
        return _read_file(file, policy)
    except (OSError, ValueError, RuntimeError):  # missing, NUL in the name, a loop of links
        raise refusal from None


def _read_own_path(path: str, policy: MediaPolicy) -> bytes:
    """Any file, for a caller who could open it too and may be told why it cannot be read."""
    try:
        return _read_file(Path(path).expanduser().resolve(strict=True), policy)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise BadMedia(f"{path[:200]} cannot be read: {reason}") from None


def _read_file(file: Path, policy: MediaPolicy) -> bytes:
    """Never blocks on a FIFO, never follows a link put there since the path was resolved, never reads past the cap."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as handle:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        _check_bytes(status.st_size, policy)
        return _capped(handle.read(policy.max_bytes + 1), policy)
