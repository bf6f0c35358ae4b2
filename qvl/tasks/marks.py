"""Found objects drawn into a copy of their picture: outlines with labels that can be read on anything, at any size.

A small picture is enlarged for drawing (its pixels stay sharp squares) and a thin one gets a grey margin, so that
labels have room. Does not know models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from qvl.tasks.boxes import Found
from qvl.tasks.fonts import font_for

Rectangle: TypeAlias = tuple[float, float, float, float]
Color: TypeAlias = tuple[int, int, int]
Picture: TypeAlias = Image.Image

SMALLEST_SIDE = 480  # the longer side of a drawn picture has at least so many pixels
BLACK, WHITE, MARGIN = (0, 0, 0), (255, 255, 255), (128, 128, 128)
COLORS: tuple[Color, ...] = (
    (225, 20, 70),
    (0, 105, 210),
    (15, 130, 55),
    (190, 85, 0),
    (135, 30, 175),
    (0, 125, 130),
    (200, 30, 185),
    (110, 85, 0),
)  # all dark enough for white text


@dataclass(frozen=True, slots=True)
class Drawing:
    """The picture with marks. `scale`: how much larger than the original; `numbered`: labels whose characters no font
    of this machine has are numbers, the object's place in the list."""

    picture: Picture
    scale: int
    numbered: bool


def draw_marks(picture: Picture, found: Sequence[Found]) -> Drawing:
    """A copy of `picture` with all of `found` outlined and labelled, each label in a colour of its own."""
    scale = max(1, -(-SMALLEST_SIDE // max(picture.size)))
    size = (picture.width * scale, picture.height * scale)
    letters = max(14, round(max(size) / 45))
    canvas = Image.new("RGB", (max(size[0], 8 * letters), max(size[1], 4 * letters)), MARGIN)
    canvas.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST))
    sketch = _Sketch(canvas, scale)
    labels = dict.fromkeys(item.label for item in found)
    colors = {label: COLORS[i % len(COLORS)] for i, label in enumerate(labels)}
    fonts = {label: font_for([label], letters) for label in labels}
    for item in found:
        sketch.outline(item, colors[item.label])
    for number, item in enumerate(found, start=1):
        font = fonts[item.label]
        text = item.label if font is not None else str(number)
        sketch.label(item, text, font or font_for([text], letters), colors[item.label])
    return Drawing(canvas, scale, numbered=None in fonts.values())


class _Sketch:
    """A canvas, what was drawn on it, and how large things are on it."""

    def __init__(self, canvas: Image.Image, scale: int) -> None:
        self._size = canvas.size
        self._pen = ImageDraw.Draw(canvas)
        self._scale = scale
        self._line = max(2, round(max(canvas.size) / 400))
        self._taken: list[Rectangle] = []

    def outline(self, item: Found, color: Color) -> None:
        """A coloured line between black and white ones: one of them stands out from any background."""
        line = self._line
        if item.point is not None:
            x, y = ((value + 0.5) * self._scale for value in item.point)
            for radius, fill in ((4 * line, BLACK), (3.4 * line, WHITE), (2.6 * line, color)):
                self._pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        elif item.quad is not None:
            corners = [(x * self._scale, y * self._scale) for x, y in item.quad]
            for width, fill in ((4 * line, BLACK), (3 * line, WHITE), (2 * line, color)):
                self._pen.line([*corners, *corners[:2]], fill=fill, width=width, joint="curve")
        elif item.box is not None:
            left, top, right, bottom = self._room_of(item)
            for out, width, fill in ((line, 1, BLACK), (line - 1, line, color), (-1, 1, WHITE)):
                low = (max(left - out, 0), max(top - out, 0))
                high = (min(right + out, self._size[0] - 1), min(bottom + out, self._size[1] - 1))
                self._pen.rectangle(
                    (*low, max(high[0], low[0]), max(high[1], low[1])), outline=fill, width=max(width, 1)
                )

    def label(self, item: Found, text: str, font: ImageFont.FreeTypeFont | None, color: Color) -> None:
        """The label on a plate of its colour, where it covers no other label and not its own object, if it can. A
        Pillow without FreeType has no font at all: then there are outlines only."""
        text = _shortened(text, font, self._size[0] - 4 * self._line) if font is not None else ""
        if font is None or not text:
            return
        wide = font.getlength(text) + 4 * self._line
        high = font.size + 3.0 * self._line
        own = self._room_of(item)
        plate = min(
            self._places(item, wide, high),
            key=lambda spot: (_overlap(spot, self._taken), _overlap(spot, [own])),
        )
        self._taken.append(plate)
        self._pen.rectangle(plate, fill=color, outline=WHITE, width=max(1, self._line // 2))
        middle = ((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2)
        self._pen.text(middle, text, fill=WHITE, font=font, anchor="mm")

    def _room_of(self, item: Found) -> Rectangle:
        """The rectangle on the canvas that an object takes."""
        left, top, right, bottom = item.box if item.box is not None else (*(item.point or (0, 0)),) * 2
        return left * self._scale, top * self._scale, right * self._scale - 1, bottom * self._scale - 1

    def _places(self, item: Found, wide: float, high: float) -> Iterator[Rectangle]:
        """Where a label may stand, best first: above, below, inside, beside; always on the canvas."""
        left, top, right, bottom = self._room_of(item)
        gap = self._line if item.point is None else 5 * self._line
        for x, y in (
            (left - gap, top - high - gap),
            (left - gap, bottom + gap),
            (left + gap, top + gap),
            (right + gap, top - gap),
            (left - wide - gap, top - gap),
            (right - wide - gap, bottom - high - gap),
        ):
            x = max(0.0, min(x, self._size[0] - wide - 1))
            y = max(0.0, min(y, self._size[1] - high - 1))
            yield x, y, x + wide, y + high


def _overlap(plate: Rectangle, others: Sequence[Rectangle]) -> float:
    """How much of a plate's area others take."""
    return sum(
        max(0.0, min(plate[2], other[2]) - max(plate[0], other[0]))
        * max(0.0, min(plate[3], other[3]) - max(plate[1], other[1]))
        for other in others
    )


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """`text`, or as much of its beginning as there is room for."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(f"{text}...") > room:
        text = text[:-1]
    return f"{text}..." if text else ""
