"""Every mode and format a caller may send, against what a viewer shows; every damaged file against BadMedia."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile

from qvl.errors import BadMedia
from qvl.media import image
from qvl.media.image import decode_image, decode_later

CAP = 178_956_970


def decode(data) -> np.ndarray:
    pixels = decode_image(data, max_pixels=CAP)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert pixels.flags.c_contiguous
    return pixels


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def corners() -> Image.Image:
    """A 24x16 picture whose four quarters are red, green / blue, yellow."""
    array = np.zeros((16, 24, 3), dtype=np.uint8)
    array[:8, :12], array[:8, 12:] = (255, 0, 0), (0, 255, 0)
    array[8:, :12], array[8:, 12:] = (0, 0, 255), (255, 255, 0)
    return Image.fromarray(array)


LOSSLESS = ["PNG", "BMP", "GIF", "TIFF", "PPM"]


@pytest.mark.parametrize("format", LOSSLESS)
def test_lossless_formats_give_their_pixels(format):
    np.testing.assert_array_equal(decode(encoded(corners(), format)), np.asarray(corners()))


def test_webp_and_jpeg_2000_without_loss():
    np.testing.assert_array_equal(decode(encoded(corners(), "WEBP", lossless=True)), np.asarray(corners()))
    np.testing.assert_array_equal(decode(encoded(corners(), "JPEG2000", irreversible=False)), np.asarray(corners()))


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
def test_lossy_formats_come_close(format):
    if format == "AVIF" and "AVIF" not in Image.registered_extensions().values():
        pytest.skip("this Pillow has no AVIF")
    pixels = decode(encoded(corners(), format, quality=95)).astype(int)
    assert np.abs(pixels[3, 3] - (255, 0, 0)).max() < 30
    assert np.abs(pixels[12, 20] - (255, 255, 0)).max() < 30


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_a_picture_upright(orientation, format):
    """The camera stored the scene turned by the inverse of what EXIF tells the viewer to do."""
    stored = corners().transpose(TURNS[orientation]) if orientation in TURNS else corners()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    pixels = decode(encoded(stored, format, exif=exif, **options)).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels - np.asarray(corners()).astype(int)).max() <= (40 if format == "JPEG" else 0)


def test_a_pil_picture_is_turned_too_and_left_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.open(io.BytesIO(encoded(corners().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)))
    assert decode(picture).shape == (16, 24, 3)
    assert picture.size == (16, 24)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing():
    data = encoded(corners(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert decode(data).shape == (16, 24, 3)


# -- JPEG files are decoded by a shorter way than Pillow's


def pillow_alone(data: bytes) -> np.ndarray | None:
    """What the longer way gives; None where it refuses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image, "_usual_jpeg", lambda *_: None)
        try:
            return decode(data)
        except BadMedia:
            return None


@st.composite
def jpeg_files(draw) -> bytes:
    size = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    coarse = Image.fromarray(rng.integers(0, 256, size=(6, 5, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC).convert(draw(st.sampled_from(["RGB", "L", "CMYK"])))
    options = {
        "quality": draw(st.integers(1, 100)),
        "progressive": draw(st.booleans()),
        "optimize": draw(st.booleans()),
        "restart_marker_blocks": draw(st.sampled_from([0, 1, 3])),
    }
    if picture.mode == "RGB":
        options["keep_rgb"] = draw(st.booleans())
        options["subsampling"] = 0 if options["keep_rgb"] else draw(st.sampled_from([0, 1, 2]))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 9))
    return encoded(picture, "JPEG", exif=exif, **options)


@settings(max_examples=100, deadline=None)
@given(jpeg_files())
def test_a_jpeg_has_the_pixels_that_pillow_gives(data):
    np.testing.assert_array_equal(decode(data), pillow_alone(data))


@settings(max_examples=150, deadline=None)
@given(jpeg_files(), st.data())
def test_a_damaged_jpeg_is_taken_or_refused_as_pillow_does(data, draw):
    file = bytearray(data[: draw.draw(st.integers(1, len(data)))])
    for _ in range(draw.draw(st.integers(0, 2))):
        file[draw.draw(st.integers(0, len(file) - 1))] = draw.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pillow_alone(bytes(file))
        if expected is None:
            with pytest.raises(BadMedia):
                decode(bytes(file))
        else:
            np.testing.assert_array_equal(decode(bytes(file)), expected)


def test_a_usual_jpeg_takes_the_short_way_and_a_cut_one_does_not(monkeypatch):
    data = encoded(corners(), "JPEG")
    monkeypatch.setattr(image, "_upright", lambda _: pytest.fail("the long way"))
    decode(data)
    with pytest.raises(pytest.fail.Exception, match="the long way"):
        decode(data[:-40])


def half_clear(mode: str) -> Image.Image:
    """Left half clear, right half opaque and black."""
    alpha = Image.new("L", (8, 4), 0)
    alpha.paste(255, (4, 0, 8, 4))
    picture = Image.new(mode, (8, 4), 0)
    picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("LA", "TIFF"), ("RGBA", "WEBP")]
)
def test_transparency_is_white(mode, format):
    data = encoded(half_clear(mode), format, **({"lossless": True} if format == "WEBP" else {}))
    pixels = decode(data)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 0).all()


def test_palette_transparency_is_white():
    picture = Image.new("P", (8, 4), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (4, 0, 8, 4))
    for options in ({"transparency": 0}, {"transparency": bytes([0, 255])}):
        pixels = decode(encoded(picture, "PNG", **options))
        assert (pixels[:, :4] == 255).all()
        assert (pixels[:, 4:] == (0, 0, 255)).all()
    assert (decode(encoded(picture, "GIF", transparency=1))[:, 4:] == 255).all()
    assert (decode(picture.convert("PA"))[:, :4] == (255, 0, 0)).all()


def test_a_transparent_colour_of_grey_and_rgb_files_is_white():
    grey = encoded(Image.new("L", (4, 4), 7), "PNG", transparency=7)
    colour = encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (decode(grey) == 255).all()
    assert (decode(colour) == 255).all()


def test_half_transparent_is_half_way_to_white():
    assert np.abs(decode(Image.new("RGBA", (2, 2), (0, 0, 0, 128))).astype(int) - 127).max() <= 1


def test_opaque_alpha_changes_nothing():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(40, 40, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.putalpha(255)
    np.testing.assert_array_equal(decode(encoded(picture, "PNG")), pixels)


def test_cmyk():
    picture = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    for data in (picture, encoded(picture, "TIFF"), encoded(picture, "JPEG", quality=95)):
        assert np.abs(decode(data)[8, 8].astype(int) - (255, 0, 0)).max() < 20


def test_16_bit_grey_is_scaled_and_not_clipped():
    values = np.array([[0, 128, 257, 32896, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 128, 255]
    for format in ("PNG", "TIFF", "PPM"):
        pixels = decode(encoded(Image.fromarray(values), format))
        assert pixels[0, :, 0].tolist() == expected, format
        assert (pixels == pixels[:, :, :1]).all()


def test_a_dark_16_bit_file_stays_dark():
    values = np.full((4, 4), 200, dtype=np.uint16)
    for format in ("PNG", "TIFF", "PPM"):
        assert decode(encoded(Image.fromarray(values), format)).max() == 1, format


def test_32_bit_and_float_grey():
    assert decode(Image.fromarray(np.array([[0, 100, 255]], dtype=np.int32)))[0, :, 0].tolist() == [0, 100, 255]
    assert decode(Image.fromarray(np.array([[0, 65535]], dtype=np.int32)))[0, :, 0].tolist() == [0, 255]
    assert decode(Image.fromarray(np.array([[-5, 0, 2**30]], dtype=np.int32)))[0, :, 0].tolist() == [0, 0, 255]
    for scale in (1.0, 255.0):
        values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32) * scale
        assert decode(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_one_bit_and_grey():
    picture = Image.new("1", (9, 3), 0)
    picture.putpixel((4, 1), 1)
    for format in ("PNG", "TIFF", "PPM", "BMP"):
        pixels = decode(encoded(picture, format))
        assert pixels[1, 4].tolist() == [255, 255, 255]
        assert pixels.sum() == 3 * 255
    assert (decode(encoded(Image.new("L", (3, 3), 77), "PNG")) == 77).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert (decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 77), (3, 1), (27, 27)])
def test_tiny_pictures(size):
    assert decode(encoded(Image.new("RGB", size, "red"), "PNG")).shape == (size[1], size[0], 3)


# -- damaged, hostile, or no picture at all


def refused(data, match: str, cap: int = CAP) -> None:
    with pytest.raises(BadMedia, match=match):
        decode_image(data, max_pixels=cap)


def test_what_is_no_picture_says_what_it_seems_to_be():
    refused(b"", "0 bytes")
    refused(b"hello", "not a picture")
    refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG")
    refused(b"<?xml version='1.0'?>\n<!-- c -->\n<svg/>", "SVG")
    refused(b"<!DOCTYPE html><html></html>", "web page")
    refused(b"%PDF-1.7", "PDF")
    refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC")
    refused(b"\0\0\0\x18ftypisom\0\0\0\0isomavc1", "send it as one")
    refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture")


def test_readers_that_are_not_on_the_list_are_not_tried():
    """Pillow can write and read these, but each reader more is a way in."""
    for format in ("TGA", "PCX", "SGI", "ICNS"):
        size = (32, 32) if format == "ICNS" else (9, 9)
        data = encoded(Image.new("RGB", size), format)
        Image.open(io.BytesIO(data)).load()
        refused(data, "not a picture")


@pytest.mark.parametrize("format", [*LOSSLESS, "JPEG", "WEBP", "JPEG2000"])
def test_truncated_files(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8))
    data = encoded(noise, format)
    for keep in (0.2, 0.6):
        refused(data[: int(len(data) * keep)], "damaged|not a picture")


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*LOSSLESS, "JPEG", "WEBP"]), st.data())
def test_flipped_bytes_never_raise_anything_but_bad_media(format, data):
    file = bytearray(encoded(corners(), format))
    for _ in range(data.draw(st.integers(1, 8))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow speaks about odd TIFF tags
        with contextlib.suppress(BadMedia):
            decode_image(bytes(file), max_pixels=10_000_000)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_a_bomb_is_refused_by_its_header(monkeypatch):
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    refused(png_claiming(50_000, 50_000), "too many pixels|at most")
    refused(png_claiming(101, 100), "101x100; this server takes at most 10000 pixels", cap=10_000)
    refused(bytes(gif), "too many pixels|at most")


def test_between_the_warning_and_the_error_of_pillow_our_own_cap_decides():
    """Pillow warns above 89 million pixels. A process that turns warnings into errors gets BadMedia all the same."""
    before = Image.MAX_IMAGE_PIXELS
    data = png_claiming(12_000, 10_000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(data, "at most 100000000", cap=100_000_000)
        warnings.simplefilter("error")
        refused(data, "too many pixels", cap=200_000_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_8000_by_10000_works():
    data = encoded(Image.new("1", (8000, 10000), 1), "PNG")
    pixels = decode(data)
    assert pixels.shape == (10000, 8000, 3)
    assert pixels.min() == 255


# -- arrays


def test_arrays():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, size=(5, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(colour), colour)
    np.testing.assert_array_equal(decode(colour[:, ::-1]), colour[:, ::-1])
    for grey in (colour[:, :, 0], colour[:, :, :1]):
        np.testing.assert_array_equal(decode(grey)[:, :, 2], colour[:, :, 0])
    clear = np.dstack([colour, np.zeros((5, 7), dtype=np.uint8)])
    assert (decode(clear) == 255).all()


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((1, 4, 4, 3), np.uint8)],
)
def test_other_arrays_are_refused_by_shape_and_type(array):
    refused(array, "is not a picture")


def test_empty_and_oversized_arrays():
    refused(np.zeros((0, 4, 3), np.uint8), "empty")
    refused(np.zeros((20, 20), np.uint8), "at most", cap=399)
    refused(Image.new("L", (20, 20)), "at most", cap=399)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _in_pieces(kind: str, count: int, size: int) -> bytes:
    """A picture with `count` pieces of `size` bytes in its file that say nothing about its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, kind)
    data = file.getvalue()
    if kind == "PNG":
        return data[:33] + _chunk(b"prVt", bytes(size)) * count + data[33:]
    if kind == "JPEG":
        return data[:2] + (b"\xff\xfe" + struct.pack(">H", size + 2) + bytes(size)) * count + data[2:]
    if kind == "GIF":
        head = 13 + 3 * 2 ** ((data[10] & 7) + 1) * (data[10] >> 7)
        return data[:head] + b"\x21\xfe" + (bytes([size]) + bytes(size)) * count + b"\0" + data[head:]
    return data[:3] + b"#" + b"x" * count * size + b"\n" + data[3:]


@pytest.mark.parametrize("kind, size", [("PNG", 0), ("JPEG", 0), ("GIF", 1), ("PPM", 1)])
def test_a_file_of_tiny_pieces_is_refused(kind, size):
    """Pillow reads them one by one, in Python: 60 MB of them took most of a minute, and every other thread's turns."""
    with pytest.raises(BadMedia, match="tiny pieces"):
        decode_image(_in_pieces(kind, 100_000, size), max_pixels=CAP)


@pytest.mark.parametrize(
    "kind, count, size", [("PNG", 3_000, 0), ("PNG", 3_000, 8192), ("JPEG", 3_000, 0), ("GIF", 20_000, 255)]
)
def test_a_file_of_many_pieces_is_read(kind, count, size):
    assert decode_image(_in_pieces(kind, count, size), max_pixels=CAP).shape == (30, 40, 3)


NOISE = np.random.default_rng(3).integers(0, 256, size=(48, 80, 3), dtype=np.uint8)


def places(shape: tuple[int, ...]) -> np.ndarray:
    return np.full(shape, 77, np.uint8)


@pytest.fixture
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures are decoded later too."""
    monkeypatch.setattr(image, "WORTH_WAITING_FOR", 0)


@pytest.mark.usefixtures("all_sizes")
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_usual_jpeg_is_decoded_later_to_the_same_pixels(mode: str) -> None:
    data = encoded(Image.fromarray(NOISE).convert(mode), "JPEG")
    begun = decode_later(data, max_pixels=10**6, empty=places)
    assert begun is not None
    pixels, decode = begun
    assert (pixels == 77).all()
    decode()
    assert np.array_equal(pixels, decode_image(data, max_pixels=10**6))


def test_small_pictures_are_not_left_for_later() -> None:
    assert decode_later(encoded(Image.new("RGB", (511, 512)), "JPEG"), max_pixels=10**6, empty=places) is None
    assert decode_later(encoded(Image.new("RGB", (512, 512)), "JPEG"), max_pixels=10**6, empty=places) is not None


@pytest.mark.usefixtures("all_sizes")
def test_what_else_there_is_is_not_left_for_later() -> None:
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files = [
        encoded(Image.fromarray(NOISE), "PNG"),
        encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
        encoded(Image.fromarray(NOISE), "JPEG", exif=turned),
    ]
    for data in files:
        assert decode_later(data, max_pixels=10**6, empty=places) is None
        found = decode_image(data, max_pixels=10**6, empty=places)
        assert np.array_equal(found, decode_image(data, max_pixels=10**6))
    assert decode_later(encoded(Image.fromarray(NOISE), "JPEG"), max_pixels=10**6, empty=lambda _: None) is None


@pytest.mark.usefixtures("all_sizes")
def test_faults_of_a_jpeg_are_told_at_once_or_when_it_is_decoded() -> None:
    data = encoded(Image.fromarray(NOISE), "JPEG")
    with pytest.raises(BadMedia, match="at most 10 pixels"):
        decode_later(data, max_pixels=10, empty=places)
    with pytest.raises(BadMedia, match="not a picture"):
        decode_later(b"nothing of the kind", max_pixels=10**6, empty=places)
    begun = decode_later(data[: len(data) // 2], max_pixels=10**6, empty=places)
    assert begun is not None
    for _ in range(2):
        with pytest.raises(BadMedia, match="damaged"):
            begun[1]()
