"""Where two pictures differ, pixel by pixel: no model is asked.

What coding and resizing change a little does not count. Does not know what the pictures show.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from qvl.media.resize import resize_bicubic
from qvl.tasks.boxes import Found
from qvl.tasks.marks import draw_marks
from qvl.tasks.pictures import Pixels

Box: TypeAlias = tuple[int, int, int, int]
Cell: TypeAlias = tuple[int, int]

# What JPEG (quality 30) and resizing do to a picture: after a mean over 3 x 3 pixels so many grey levels, and beyond
# that spots less than 3 pixels wide. A line of one pixel is 3 wide by then, and stays.
SLIGHT, SPOT = 32, 3
CELLS = 96  # along the longer side: changes closer than one of them belong together
MOST_DRAWN = 50
_FADED = 0.35  # how much of the picture shines through where nothing changed
_RED = (220, 0, 30)


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two pictures, in pixels of the first: `changed` is the share of its pixels, `regions` are (left, top, right,
    bottom), from top to bottom. `identical`: not one pixel differs at all. `same_size`: the two have one size."""

    changed: float
    regions: tuple[Box, ...]
    identical: bool
    same_size: bool
    mask: npt.NDArray[np.bool_] = field(compare=False, repr=False)

    def told(self) -> str:
        """In words."""
        if self.identical:
            return "the pictures are the same, pixel for pixel"
        sizes = "" if self.same_size else " (of different sizes: seen at the smaller one)"
        if not self.regions:
            return f"no pixel differs by more than coding or resizing would do{sizes}"
        places = f"{len(self.regions)} place{'s' if len(self.regions) > 1 else ''}"
        return f"{_percent(self.changed)} of the pixels differ, in {places}{sizes}"


SAME = Difference(0.0, (), True, True, np.zeros((0, 0), np.bool_))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def difference(first: Pixels, second: Pixels) -> Difference:
    """Of two pictures uint8 [h, w, 3]; where their sizes differ, both are seen at the smaller one."""
    if first.shape == second.shape and np.array_equal(first, second):
        return replace(SAME, mask=np.zeros(first.shape[:2], np.bool_))
    height, width = (min(sides) for sides in zip(first.shape[:2], second.shape[:2], strict=True))
    one, other = (_softened(pixels, height, width) for pixels in (first, second))
    small = Image.fromarray(((np.abs(one - other).max(axis=2) > SLIGHT) * 255).astype(np.uint8))
    small = small.filter(ImageFilter.MinFilter(SPOT)).filter(ImageFilter.MaxFilter(SPOT))
    mask = np.asarray(small.resize((first.shape[1], first.shape[0]), Image.Resampling.NEAREST), np.bool_)
    return Difference(float(mask.mean()), tuple(_regions(mask)), False, first.shape == second.shape, mask)


def _softened(pixels: Pixels, height: int, width: int) -> npt.NDArray[np.int16]:
    """At this size, each pixel the mean of its neighbourhood."""
    picture = Image.fromarray(resize_bicubic(pixels, height, width))
    return np.asarray(picture.filter(ImageFilter.BoxBlur(1)), np.int16)


def _regions(mask: npt.NDArray[np.bool_]) -> list[Box]:
    """Boxes around changes that lie together."""
    height, width = mask.shape
    cell = max(4, -(-max(height, width) // CELLS))
    padded = np.pad(mask, ((0, -height % cell), (0, -width % cell)))
    grid = padded.reshape(padded.shape[0] // cell, cell, padded.shape[1] // cell, cell).any(axis=(1, 3))
    boxes = []
    for group in _groups({(int(y), int(x)) for y, x in np.argwhere(grid)}):
        rows, columns = [y for y, _ in group], [x for _, x in group]
        top, left = min(rows) * cell, min(columns) * cell
        inside = mask[top : (max(rows) + 1) * cell, left : (max(columns) + 1) * cell]
        ys, xs = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
        boxes.append((left + int(xs[0]), top + int(ys[0]), left + int(xs[-1]) + 1, top + int(ys[-1]) + 1))
    return sorted(boxes, key=lambda box: (box[1], box[0]))


def _groups(cells: set[Cell]) -> Iterable[list[Cell]]:
    """Cells that touch, also at their corners."""
    while cells:
        waiting = [cells.pop()]
        group = []
        while waiting:
            y, x = waiting.pop()
            group.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & cells
            cells -= near
            waiting += near
        yield group


def draw_difference(first: Pixels, found: Difference) -> Image.Image:
    """The first picture, pale and grey, what differs in red, and a box around each place (of many, the largest)."""
    grey = first.astype(np.float32).mean(axis=2, keepdims=True).repeat(3, axis=2)
    canvas = (255 - (255 - grey) * _FADED).astype(np.uint8)
    canvas[found.mask] = _RED
    regions = sorted(found.regions, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]), reverse=True)[:MOST_DRAWN]
    regions = [box for box in found.regions if box in regions]
    marks = [Found(str(number), box) for number, box in enumerate(regions, start=1)]
    return draw_marks(Image.fromarray(canvas), marks).picture
