"""Pages with named coloured shapes. Knows names, colours and outlines; not questions."""

import itertools
import math
import random
from dataclasses import dataclass

from tools.demo_model.draw import Box, Color, Page, blank, color_at
from tools.demo_model.vocab import NUM_CLASSES

COLORS: dict[str, Color] = {
    "red": (220, 30, 35), "green": (30, 160, 60), "blue": (35, 75, 220), "yellow": (245, 215, 30),
    "orange": (245, 135, 20), "purple": (135, 45, 165), "pink": (245, 135, 180), "black": (20, 20, 20),
    "gray": (128, 128, 128), "brown": (125, 75, 35),
}  # fmt: skip
CHINESE_COLORS = {
    "red": "红",
    "green": "绿",
    "blue": "蓝",
    "yellow": "黄",
    "orange": "橙",
    "purple": "紫",
    "black": "黑",
}
CHINESE_KINDS = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "diamond": "菱形"}
KINDS = ("circle", "square", "triangle", "rectangle", "star", "diamond", "ellipse", "cross")
# What the training-only head calls a shape, at its centre; after the characters' classes.
CLASS_OF = {f"{color} {kind}": NUM_CLASSES + n for n, (color, kind) in enumerate(itertools.product(COLORS, KINDS))}


@dataclass
class Shape:
    color: str
    kind: str
    box: Box  # x1, y1, x2, y2 in pixels
    ref: int = -1  # the page's point at its centre

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


def outline(kind: str, box: Box) -> list[tuple[float, float]]:
    """Corner points of the straight-sided kinds; they touch all four sides of the box."""
    x1, y1, x2, y2 = box
    cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    if kind == "triangle":
        return [(cx, y1), (x2, y2), (x1, y2)]
    if kind == "diamond":
        return [(cx, y1), (x2, cy), (cx, y2), (x1, cy)]
    if kind == "cross":
        a, b = w / 3, h / 3
        return [
            (x1 + a, y1), (x2 - a, y1), (x2 - a, y1 + b), (x2, y1 + b), (x2, y2 - b), (x2 - a, y2 - b),
            (x2 - a, y2), (x1 + a, y2), (x1 + a, y2 - b), (x1, y2 - b), (x1, y1 + b), (x1 + a, y1 + b),
        ]  # fmt: skip
    if kind == "star":
        raw = []
        for n in range(10):
            radius, angle = (1.0, 0.45)[n % 2], math.pi * n / 5
            raw.append((radius * math.sin(angle), -radius * math.cos(angle)))
        xs, ys = [x for x, _ in raw], [y for _, y in raw]
        return [
            (x1 + w * (x - min(xs)) / (max(xs) - min(xs)), y1 + h * (y - min(ys)) / (max(ys) - min(ys))) for x, y in raw
        ]
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def extent(rng: random.Random, kind: str, largest: float) -> tuple[float, float]:
    """Width and height for a kind."""
    size = rng.uniform(28, max(30.0, largest))
    if kind in ("rectangle", "ellipse"):
        ratio = rng.uniform(1.5, 2.2)
        return (size, size / ratio) if rng.random() < 0.5 else (size / ratio, size)
    return size, size


def put(page: Page, shape: Shape, ink: Color) -> None:
    if shape.kind in ("circle", "ellipse"):
        page.draw.ellipse(shape.box, fill=ink)
    else:
        page.draw.polygon(outline(shape.kind, shape.box), fill=ink)


def _apart(box: Box, others: list[Box], gap: float = 5) -> bool:
    return all(
        box[2] + gap < other[0] or other[2] + gap < box[0] or box[3] + gap < other[1] or other[3] + gap < box[1]
        for other in others
    )


def jitter(rng: random.Random, color: Color, amount: int = 14) -> Color:
    r, g, b = (max(0, min(255, value + rng.randint(-amount, amount))) for value in color)
    return r, g, b


def shapes_page(
    rng: random.Random, width: int, height: int, count: int, taken: list[Box] | None = None, page: Page | None = None
) -> tuple[Page, list[Shape]]:
    """Up to `count` shapes that differ in colour or kind and do not touch, on light or dark paper."""
    if page is None:
        page = blank(rng, width, height, plain=rng.random() < 0.7)
        if rng.random() < 0.5:
            tone = rng.randint(225, 255)
            page.image.paste((tone, tone, tone), (0, 0, width, height))
    paper = color_at(page.image, 2, 2)
    boxes: list[Box] = list(taken or [])
    shapes: list[Shape] = []
    for _ in range(count * 8):
        if len(shapes) == count:
            break
        color, kind = rng.choice(list(COLORS)), rng.choice(KINDS)
        wide, high = extent(rng, kind, min(0.8 * height, 0.75 * width, 1.6 * math.sqrt(width * height / count) * 0.5))
        if wide > width - 8 or high > height - 8:
            continue
        x, y = rng.uniform(3, width - wide - 3), rng.uniform(3, height - high - 3)
        box = (x, y, x + wide, y + high)
        ink = jitter(rng, COLORS[color])
        visible = max(abs(a - b) for a, b in zip(ink, paper, strict=True)) > 60
        if visible and _apart(box, boxes) and all((s.color, s.kind) != (color, kind) for s in shapes):
            shapes.append(Shape(color, kind, box))
            boxes.append(box)
            put(page, shapes[-1], ink)
            shapes[-1].ref = page.mark(*shapes[-1].center, CLASS_OF[shapes[-1].name])
    return page, shapes
