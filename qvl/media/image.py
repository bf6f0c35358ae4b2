"""One picture, whatever its file format, as upright RGB pixels on white.

Knows Pillow's modes and what a viewer would show for them. Does not know where bytes come from, nor the model's
sizes. Pillow's own limit for decompression bombs stays as the process has it; ours is checked on the header
beside it.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from qvl.errors import BadMedia, QvlError
from qvl.media.stages import stage

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "AVIF")
_FREE_READS = 10_000
_BYTES_A_READ = 64  # real files have 8,192 (PNG) or 128 (GIF) for each read at the least
WHITE = (255, 255, 255, 255)
WORTH_WAITING_FOR = 1 << 18  # pixels; fewer are decoded in less time than it takes to do so beside other things

# What a damaged or hostile file makes Pillow's readers raise.
_DECODE_ERRORS = (
    OSError,  # UnidentifiedImageError is one
    ValueError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    AttributeError,
    EOFError,
    RuntimeError,
    AssertionError,
    MemoryError,
    struct.error,
    zlib.error,
    Warning,  # where the process turns warnings into errors
)
Pixels: TypeAlias = npt.NDArray[np.uint8]
# Makes an array of a shape, where pixels shall lie; None when there is no place.
Empty: TypeAlias = Callable[[tuple[int, ...]], Pixels | None]
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@stage("decode")
def decode_image(data: bytes | Image.Image | Pixels, *, max_pixels: int, empty: Empty | None = None) -> Pixels:
    """A file's bytes, a PIL picture or a uint8 array ([h, w] or [h, w, 1 | 3 | 4]) as uint8 [h, w, 3], C-contiguous.

    Turned upright by EXIF, composited on white where transparent, the first frame of an animation. Raises
    BadMedia when it cannot be decoded or has more than `max_pixels` pixels (decided from the header, before any
    pixel is decoded). What a file shows is put where `empty` says, an array that is there stays where it is.
    """
    if isinstance(data, np.ndarray):
        return _from_array(data, max_pixels)
    try:
        picture = data if isinstance(data, Image.Image) else _open(data)
        _check_size(picture.width, picture.height, max_pixels)
        pixels = _usual_jpeg(data, picture, empty) if isinstance(data, bytes) else None
        if pixels is None:
            pixels = _placed(_to_rgb(_upright(picture)), empty)
    except QvlError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels))  # Pillow refuses above twice its number
        raise BadMedia(f"the picture has too many pixels; this server takes at most {most}: send it smaller") from None
    except _DECODE_ERRORS:
        raise BadMedia("the picture is damaged and cannot be decoded") from None
    return np.ascontiguousarray(pixels)


def decode_later(data: bytes, *, max_pixels: int, empty: Empty) -> tuple[Pixels, Callable[[], None]] | None:
    """Where the pixels [h, w, 3] of a usual JPEG of some size will be, and who decodes them; None for all others.

    Raises BadMedia as `decode_image` does; both of them do, since a file's faults may lie behind its head.
    """
    try:
        picture = _open(data)
        _check_size(picture.width, picture.height, max_pixels)
        is_small = picture.width * picture.height < WORTH_WAITING_FOR
        if is_small or not _is_usual(picture) or _turn(picture) is not None:
            return None
        pixels = empty((picture.height, picture.width, 3))
    except QvlError:
        raise
    except (*_DECODE_ERRORS, Image.DecompressionBombError):
        return None  # whatever it is, `decode_image` will say it
    if pixels is None:
        return None
    return pixels, stage("decode")(functools.partial(_fill, pixels, data, max_pixels))


def _fill(pixels: Pixels, data: bytes, max_pixels: int) -> None:
    try:
        if simplejpeg.decode_jpeg(data, "RGB", buffer=pixels).shape == pixels.shape:
            return
    except ValueError:
        pass
    decoded = decode_image(data, max_pixels=max_pixels)
    if decoded.shape != pixels.shape:
        raise BadMedia("the picture is damaged and cannot be decoded")
    np.copyto(pixels, decoded)


class _Pieces(io.BytesIO):
    """A file's bytes, read in at most so many pieces as their number makes plausible.

    Pillow walks through the parts of a file (chunks, segments, comments) in Python, some microseconds for each, and a
    part may have four bytes.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _FREE_READS + len(data) // _BYTES_A_READ

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise BadMedia("the picture's file is made of too many tiny pieces")
        return super().read(size)


def _open(data: bytes) -> Image.Image:
    """Read the header."""
    if not data:
        raise BadMedia("the picture has 0 bytes")
    try:
        return Image.open(_Pieces(data), formats=_formats())
    except UnidentifiedImageError:
        raise BadMedia(f"not a picture that can be read{_looks_like(data)}; send PNG, JPEG, WebP or GIF") from None


@functools.lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """The allowed formats that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _looks_like(data: bytes) -> str:
    """What the bytes seem to be instead, for the error text."""
    head = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in head:
        return " (it is an SVG drawing, which has no pixels)"
    if head.startswith((b"<!doctype html", b"<html")):
        return " (it is a web page)"
    if head.startswith(b"%pdf"):
        return " (it is a PDF document)"
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return " (it is HEIC)"
    if data[4:8] == b"ftyp" or data.startswith(b"\x1aE\xdf\xa3"):
        return " (it is a video: send it as one)"
    return ""


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise BadMedia("the picture is empty")
    if width * height > max_pixels:
        raise BadMedia(f"the picture is {width}x{height}; this server takes at most {max_pixels} pixels")


def _placed(pixels: Pixels, empty: Empty | None) -> Pixels:
    """`pixels`, where `empty` wants them, if it does."""
    place = None if empty is None else empty(pixels.shape)
    if place is None:
        return pixels
    np.copyto(place, pixels)
    return place


def _usual_jpeg(data: bytes, picture: Image.Image, empty: Empty | None) -> Pixels | None:
    """The pixels of a JPEG of three colours or grey without a fault, upright: equal to Pillow's, in half the time.

    The same library decodes in one call, without the interpreter's lock, and straight to where the pixels stay. None
    for all other files: what to make of them is Pillow's to say.
    """
    if not _is_usual(picture):
        return None
    turn = _turn(picture)
    shape = (picture.height, picture.width, 3)
    place = None if empty is None or turn is not None else empty(shape)
    pixels = np.empty(shape, dtype=np.uint8) if place is None else place
    try:
        if simplejpeg.decode_jpeg(data, "RGB", buffer=pixels).shape != pixels.shape:
            return None
    except ValueError:
        return None
    return pixels if turn is None else _placed(np.asarray(Image.fromarray(pixels).transpose(turn)), empty)


def _is_usual(picture: Image.Image) -> bool:
    return picture.format == "JPEG" and picture.mode in ("RGB", "L")


def _upright(picture: Image.Image) -> Image.Image:
    """Decode, then turn as EXIF says, which may stand behind the pixels."""
    picture.load()
    turn = _turn(picture)
    return picture if turn is None else picture.transpose(turn)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """EXIF that cannot be read turns nothing."""
    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        return None
    return _UPRIGHT.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(picture: Image.Image) -> npt.NDArray[np.uint8]:
    if picture.mode.startswith(("I", "F")):
        grey = _to_8_bits(np.asarray(picture), picture.format in ("PNG", "PPM") or ";16" in picture.mode)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, WHITE), picture)
    return np.asarray(picture.convert("RGB"))


def _to_8_bits(grey: npt.NDArray[np.generic], is_16_bit: bool) -> npt.NDArray[np.uint8]:
    """Grey of 16 bits, or of 32 bits whose file does not say what white is, scaled (never clipped) to 0..255."""
    values = np.nan_to_num(grey.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(values.max())
    if is_16_bit:
        white = 65535.0
    else:
        steps = (1.0, 255.0, 65535.0) if np.issubdtype(grey.dtype, np.floating) else (255.0, 65535.0)
        white = next((step for step in steps if peak <= step), peak)
    scaled: npt.NDArray[np.uint8] = np.rint(np.clip(values / white, 0.0, 1.0) * 255.0).astype(np.uint8)
    return scaled


def _from_array(array: npt.NDArray[np.uint8], max_pixels: int) -> npt.NDArray[np.uint8]:
    """[h, w] or [h, w, 1 | 3 | 4] -> [h, w, 3]; no copy where nothing changes."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise BadMedia(
            f"an array of {array.dtype} {list(array.shape)} is not a picture; give uint8 [h, w, 3], [h, w, 4] or [h, w]"
        )
    _check_size(array.shape[1], array.shape[0], max_pixels)
    if array.ndim == 3 and array.shape[2] == 3:
        return np.ascontiguousarray(array)
    if array.ndim == 3 and array.shape[2] == 4:
        return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
