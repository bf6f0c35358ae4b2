"""Draws the sample pictures of the documents: `python tools/draw_samples.py`. The font is the one inside Pillow.

Knows what the samples show; samples/questions.json says what to ask about them and what to expect.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

FOLDER = Path(__file__).resolve().parent.parent / "samples"
INK, PAPER = (25, 25, 30), (250, 248, 243)
NOTE = ("Meeting at 10:30", "Room 204, second floor", "Bring the blue folder")
TABLE = (("Item", "Price", "Count"), ("Apples", "240", "6"), ("Bread", "315", "1"), ("Milk", "129", "2"))
WORDS = ("North", "East", "South")


def font(size: int) -> ImageFont.FreeTypeFont:
    loaded = ImageFont.load_default(size)
    assert isinstance(loaded, ImageFont.FreeTypeFont), "this Pillow was built without FreeType"
    return loaded


def lines(texts: tuple[str, ...], size: int = 34) -> Image.Image:
    """Left-aligned lines with a margin of one line height."""
    face = font(size)
    width = max(int(face.getlength(text)) for text in texts) + 2 * size
    picture = Image.new("RGB", (width, int(size * (1.5 * len(texts) + 1.5))), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate(texts):
        draw.text((size, size * (1 + 1.5 * i)), text, INK, face)
    return picture


def table(rows: tuple[tuple[str, ...], ...], size: int = 30) -> Image.Image:
    """A ruled table."""
    face, high = font(size), 2 * size
    widths = [int(max(face.getlength(cell) for cell in column)) + 2 * size for column in zip(*rows, strict=True)]
    picture = Image.new("RGB", (sum(widths) + 2 * size, high * len(rows) + 2 * size), "white")
    draw = ImageDraw.Draw(picture)
    for r, row in enumerate(rows):
        left = size
        for cell, width in zip(row, widths, strict=True):
            draw.rectangle((left, size + r * high, left + width, size + (r + 1) * high), outline=INK, width=2)
            draw.text((left + size, size + (r + 0.5) * high), cell, INK, face, anchor="lm")
            left += width
    return picture


def shapes() -> Image.Image:
    """Three shapes; questions.json knows the box of the circle."""
    picture = Image.new("RGB", (560, 420), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 60, 200, 200), (220, 30, 35))
    draw.rectangle((320, 90, 500, 210), (35, 75, 220))
    draw.polygon([(250, 250), (340, 380), (160, 380)], (30, 160, 60))
    return picture


def clip(path: Path, words: tuple[str, ...]) -> None:
    """Each word for a second, black on white, 8 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 336, 224, "yuv420p", 2_000_000
        for word in words:
            picture = Image.new("RGB", (336, 224), "white")
            ImageDraw.Draw(picture).text((168, 112), word, INK, font(64), anchor="mm")
            for _ in range(8):
                for packet in stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")):
                    container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    lines(NOTE).save(FOLDER / "sample.png", optimize=True)
    lines(("OPEN", "8 to 17"), 48).save(FOLDER / "open.png", optimize=True)
    lines(("CLOSED", "today"), 48).save(FOLDER / "closed.png", optimize=True)
    table(TABLE).save(FOLDER / "table.png", optimize=True)
    shapes().save(FOLDER / "shapes.png", optimize=True)
    clip(FOLDER / "words.mp4", WORDS)


if __name__ == "__main__":
    main()
