"""Pages drawn with Pillow that remember where every character's centre is.

Knows fonts, colours and geometry. Does not know questions, tokens or batches.
"""

import functools
import random
import weakref
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.demo_model import words
from tools.demo_model.fonts import FontBook, load
from tools.demo_model.vocab import CLASS_OF

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Pairs (ink, paper) kept for scoring: training never draws a pair close to one of these.
HELD_OUT_COLORS: list[tuple[Color, Color]] = [
    ((20, 60, 90), (240, 225, 200)), ((250, 240, 210), (70, 40, 80)), ((90, 20, 40), (215, 235, 225)),
    ((10, 70, 50), (250, 215, 190)), ((225, 250, 240), (110, 50, 20)), ((60, 40, 110), (230, 240, 180)),
]  # fmt: skip


@dataclass
class Line:
    """Printed text, the page's point for each of its characters (-1: a space) and the ink's box."""

    text: str
    refs: list[int]
    box: Box


@dataclass
class Page:
    image: Image.Image
    ink: Color
    points: list[tuple[float, float, int]] = field(default_factory=list)  # x, y, class (0: a place, no character)

    @property
    def draw(self) -> ImageDraw.ImageDraw:
        return ImageDraw.Draw(self.image)

    def mark(self, x: float, y: float, kind: int = 0) -> int:
        self.points.append((x, y, kind))
        return len(self.points) - 1

    def text(
        self, x: float, baseline: float, text: str, font: ImageFont.FreeTypeFont, ink: Color | None = None
    ) -> Line:
        """Print one line with its left end at x; every character's centre becomes a point."""
        self.draw.text((x, baseline), text, fill=ink or self.ink, font=font, anchor="ls")
        middle = baseline - cap_height(font) / 2
        refs, left = [], x
        for character in text:
            kind, width = CLASS_OF.get(character), advance(font, character)
            refs.append(-1 if kind is None else self.mark(left + width / 2, middle, kind))
            left += width
        a, b, c, d = font.getbbox(text, anchor="ls")
        return Line(text, refs, (x + a, baseline + b, x + c, baseline + d))


_ADVANCES: weakref.WeakKeyDictionary[ImageFont.FreeTypeFont, dict[str, float]] = weakref.WeakKeyDictionary()


def advance(font: ImageFont.FreeTypeFont, character: str) -> float:
    """Width of one character, remembered as long as the font object lives."""
    known = _ADVANCES.setdefault(font, {})
    if character not in known:
        known[character] = font.getlength(character)
    return known[character]


def length(font: ImageFont.FreeTypeFont, text: str) -> float:
    """Width of a line; kerning, a pixel or two, is left out for speed."""
    return sum(advance(font, character) for character in text)


@functools.lru_cache(maxsize=4096)
def cap_height(font: ImageFont.FreeTypeFont) -> float:
    return -font.getbbox("H", anchor="ls")[1]


@functools.lru_cache(maxsize=2048)
def _em_per_cap(path: str) -> float:
    return 100 / max(cap_height(load(path, 100)), 40)


def font_of_height(path: str, height: float) -> ImageFont.FreeTypeFont:
    """The font at the size that makes capitals `height` pixels high."""
    return load(path, round(height * _em_per_cap(path)))


def color_at(image: Image.Image, x: int, y: int) -> Color:
    r, g, b = np.asarray(image)[y, x].tolist()
    return r, g, b


def luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _near(one: Color, other: Color) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) < 20


def colors(rng: random.Random, plain: bool = False) -> tuple[Color, Color]:
    """(ink, paper) of readable contrast; `plain`: dark on light only."""
    while True:
        kind = rng.random()
        if plain or kind < 0.45:
            dark, light = rng.randint(0, 60), rng.randint(200, 255)
            ink, paper = (dark, dark, dark), (light, light, min(255, light + rng.randint(-10, 10)))
        else:
            ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
            paper = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        held_out = any(_near(ink, a) and _near(paper, b) for a, b in HELD_OUT_COLORS)
        if abs(luminance(ink) - luminance(paper)) > 80 and not held_out:
            return ink, paper


def blank(rng: random.Random, width: int, height: int, plain: bool = False) -> Page:
    """Paper: one colour, now and then a gradient, bands, or specks."""
    ink, paper = colors(rng, plain)
    image = Image.new("RGB", (width, height), paper)
    if plain or rng.random() < 0.7:
        return Page(image, ink)
    kind = rng.random()
    shift = rng.randint(-35, 35)
    other = tuple(max(0, min(255, value + shift + rng.randint(-15, 15))) for value in paper)
    if kind < 0.5:
        ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize((width, height))
        image.paste(Image.new("RGB", (width, height), other), (0, 0), ramp)
    elif kind < 0.75:
        pen, step = ImageDraw.Draw(image), rng.randint(9, 40)
        for y in range(rng.randrange(step), height, step):
            pen.line((0, y, width, y), fill=other, width=rng.randint(1, 3))
    else:
        pen = ImageDraw.Draw(image)
        for _ in range(rng.randint(3, 12)):
            x, y, size = rng.randrange(width), rng.randrange(height), rng.randint(5, 90)
            pen.ellipse((x, y, x + size, y + rng.randint(5, 90)), fill=other)
    return Page(image, ink)


def odd_height(rng: random.Random, low: float, high: float) -> int:
    """A capital's height; multiples of five are kept for scoring."""
    height = round(rng.triangular(low, max(low, high), low + 0.25 * max(0.0, high - low)))
    return height + 1 if height % 5 == 0 else height


def clip(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    while len(text) > 1 and length(font, text) > room:
        text = text[: min(len(text) - 1, int(len(text) * room / length(font, text)))].rstrip() or text[0]
    return text


def line_text(rng: random.Random, font: ImageFont.FreeTypeFont, room: float, height: float, script: str) -> str:
    if script == "chinese":
        limit = max(1, int(room / (font.getlength("国") + 0.1)))
        text = words.chinese(rng, rng.randint(max(1, limit // 3), limit))
    else:
        limit = max(2, int(room / (0.66 * height)))
        text = words.line(rng, limit if rng.random() < 0.6 else rng.randint(2, limit))
    return clip(text, font, room)


def text_page(
    rng: random.Random, book: FontBook, width: int, height: int, lines: int, plain: bool = False, script: str = "latin"
) -> tuple[Page, list[Line]]:
    """A page of `lines` lines of print (fewer when they do not fit)."""
    page = blank(rng, width, height, plain)
    lines = max(1, min(lines, int((height - 10) / 30)))
    pitch = rng.uniform(1.55, 2.1) if lines > 1 else 1.5
    tallest = min(64.0, (height - 16) / (pitch * (lines - 1) + 1.4))
    cap = odd_height(rng, 19, min(tallest, 44 if rng.random() < 0.85 else tallest))
    path = book.pick(rng, script == "chinese")
    if script == "chinese":
        cap, pitch = max(18, int(cap * 0.85)), pitch * 1.1
    font = font_of_height(path, cap)
    margin = rng.randint(8, 18)
    room = width - 2 * margin
    align = rng.choices([0.0, 0.5, 1.0, -1.0], [0.6, 0.2, 0.05, 0.15])[0]
    step = min(pitch * cap, (height - 16 - 1.35 * cap) / max(1, lines - 1)) if lines > 1 else 0.0
    spare = height - 12 - cap * 1.35 - step * (lines - 1)
    baseline = 5 + cap * 1.05 + rng.random() * max(0.0, spare)
    printed, mixed = [], lines > 1 and rng.random() < 0.15
    for _ in range(lines):
        if mixed:
            font = font_of_height(book.pick(rng, script == "chinese"), cap)
        text = line_text(rng, font, room, cap, script)
        free = room - length(font, text)
        x = margin + max(0.0, free) * (rng.random() if align < 0 else align)
        printed.append(page.text(x, baseline, text, font))
        baseline += step
    return page, printed


def table_page(
    rng: random.Random, book: FontBook, width: int, height: int, rows: int, columns: int, plain: bool = False
) -> tuple[Page, list[list[Line]]]:
    """A page with one table, ruled or not; the first row is the head."""
    page = blank(rng, width, height, plain or rng.random() < 0.6)
    left, top = rng.uniform(4, 0.12 * width), rng.uniform(4, 0.1 * height)
    wide = min(width - 4 - left, rng.uniform(0.75, 1.0) * (width - 2 * left) + left)
    high = min((height - 4 - top) / rows, rng.uniform(36, 60))
    shares = [rng.uniform(0.8, 1.25) for _ in range(columns)]
    edges = [left]
    for share in shares:
        edges.append(edges[-1] + wide * share / sum(shares))
    cap = odd_height(rng, 19, min(28, high * 0.55))
    path = book.pick(rng)
    font, bold = font_of_height(path, cap), font_of_height(book.pick(rng) if rng.random() < 0.3 else path, cap)
    paper, rule = color_at(page.image, 1, 1), rng.choice(["all", "all", "rows", "head", "none"])
    shade = tuple(int(0.85 * a + 0.15 * b) for a, b in zip(paper, page.ink, strict=True))
    if rng.random() < 0.4:
        page.draw.rectangle((left, top, edges[-1], top + high), fill=shade)
    _rules(page, rule, edges, top, high, rows, rng.randint(1, 2))
    align = rng.choice([0.0, 0.0, 0.5])
    cells: list[list[Line]] = []
    for row in range(rows):
        cells.append([])
        for column in range(columns):
            room = edges[column + 1] - edges[column] - 12
            face = bold if row == 0 else font
            text = clip(words.short(rng, max(1, int(room / (0.68 * cap)))), face, room)
            x = edges[column] + 6 + align * max(0.0, room - length(face, text))
            cells[-1].append(page.text(x, top + row * high + (high + cap) / 2, text, face))
    return page, cells


def _rules(page: Page, rule: str, edges: list[float], top: float, high: float, rows: int, width: int) -> None:
    bottom, pen = top + rows * high, page.draw
    for row in range(rows + 1):
        if rule in ("all", "rows") or (rule == "head" and row == 1):
            pen.line((edges[0], top + row * high, edges[-1], top + row * high), fill=page.ink, width=width)
    if rule == "all":
        for edge in edges:
            pen.line((edge, top, edge, bottom), fill=page.ink, width=width)
