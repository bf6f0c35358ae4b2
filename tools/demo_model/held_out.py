"""Pictures for scoring: fonts, letter heights, colours and layouts that training never draws.

Training draws free lines on plain or patterned paper, in pictures of whole tokens, at letter heights that are no
multiple of five. Here everything is on cards, notes with a ruled margin or stepped lines, at heights of 20, 25, 30 and
35 pixels, in reserved colour pairs and pictures of any size, then turned, made noisy and saved as JPEG by Pillow.
"""

import io
import itertools
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tools.demo_model import words
from tools.demo_model.draw import HELD_OUT_COLORS, Page, clip, color_at, font_of_height, length
from tools.demo_model.fonts import FontBook
from tools.demo_model.shapes import Shape, shapes_page

HEIGHTS = (20, 25, 30, 35)


@dataclass
class Drawn:
    """One picture and what is on it."""

    image: Image.Image
    lines: list[str]
    shapes: list[Shape]
    boxes: list[tuple[float, float, float, float]]  # of the lines


def wear(rng: random.Random, image: Image.Image, turn: bool = True) -> Image.Image:
    """Light rotation, noise and JPEG, each in some of the pictures."""
    if turn and rng.random() < 0.4:
        corner = image.getpixel((0, 0))
        image = image.rotate(rng.uniform(-2.5, 2.5), Image.Resampling.BICUBIC, expand=True, fillcolor=corner)
    if rng.random() < 0.4:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(3, 12), (*image.size[::-1], 3))
        image = Image.fromarray((np.asarray(image, np.float32) + noise).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        data = io.BytesIO()
        image.save(data, "JPEG", quality=rng.randint(40, 90))
        image = Image.open(data).convert("RGB")
    return image


def _card(rng: random.Random, width: int, height: int) -> Page:
    """Paper in a reserved colour: bare, as a framed card, or as a note with a margin rule."""
    ink, paper = rng.choice([((25, 25, 25), (255, 255, 255)), *HELD_OUT_COLORS])
    page = Page(Image.new("RGB", (width, height), paper), ink)
    soft = tuple((3 * a + b) // 4 for a, b in zip(paper, ink, strict=True))
    kind = rng.random()
    if kind < 0.3:
        page.draw.rectangle((3, 3, width - 4, height - 4), outline=soft, width=3)
    elif kind < 0.5:
        page.draw.line((9, 0, 9, height), fill=soft, width=2)
    return page


def text_card(rng: random.Random, book: FontBook, count: int, script: str = "latin", limit: int = 20) -> Drawn:
    """`count` lines; stepped, ranged right, or ranged left with uneven gaps."""
    cap = rng.choice([height for height in HEIGHTS if count * height <= 150 or height == 20])
    font = font_of_height(book.pick(rng, script == "chinese"), cap)
    width = rng.randint(260, 420)
    if script == "chinese":
        texts = [words.chinese(rng, rng.randint(2, max(2, min(9, (width - 40) // (cap + 12))))) for _ in range(count)]
    else:
        texts = [words.line(rng, limit) for _ in range(count)]
    texts = [clip(text, font, width - 44) for text in texts]
    gaps = [cap * rng.choice([1.7, 1.9, 2.2]) for _ in texts]
    page = _card(rng, width, round(sum(gaps) + cap + rng.randint(16, 60)))
    style, baseline, lines = rng.choice(["step", "right", "left"]), cap + 14.0, []
    for n, (text, gap) in enumerate(zip(texts, gaps, strict=True)):
        free = width - 40 - length(font, text)
        x = 20 + {"step": min(free, 14.0 * n), "right": free, "left": 0.0}[style]
        lines.append(page.text(x, baseline, text, font))
        baseline += gap
    return Drawn(page.image, texts, [], [line.box for line in lines])


def table_card(rng: random.Random, book: FontBook, rows: int, columns: int) -> tuple[Image.Image, list[list[str]]]:
    """A table with a double outline, and rules between columns only or bands behind every other row."""
    cap = rng.choice([20, 25]) if columns < 4 else 20
    font = font_of_height(book.pick(rng), cap)
    cells = [[words.short(rng, 6) for _ in range(columns)] for _ in range(rows)]
    widths = [max(length(font, row[column]) for row in cells) + 26 for column in range(columns)]
    high, left, top = cap * 2.1, 14, 12
    page = _card(rng, round(sum(widths) + 2 * left), round(rows * high + 2 * top))
    paper = color_at(page.image, page.image.width // 2, 6)
    soft = tuple((6 * a + b) // 7 for a, b in zip(paper, page.ink, strict=True))
    banded, x = rng.random() < 0.5, float(left)
    for row in range(1, rows, 2) if banded else []:
        page.draw.rectangle((left, top + row * high, left + sum(widths), top + (row + 1) * high), fill=soft)
    for inset in (0, 4):
        edge = (left - inset, top - inset, left + sum(widths) + inset, top + rows * high + inset)
        page.draw.rectangle(edge, outline=page.ink)
    for column, width in enumerate(widths):
        if column and not banded:
            page.draw.line((x, top, x, top + rows * high), fill=page.ink, width=1)
        for row in range(rows):
            page.text(x + 13, top + row * high + (high + cap) / 2, cells[row][column], font)
        x += width
    return page.image, cells


def shapes_card(rng: random.Random) -> Drawn:
    """Shapes on paper of a size that training never used."""
    width, height = rng.randint(240, 430), rng.randint(220, 380)
    paper = rng.choice([(252, 246, 228), (255, 255, 255), (226, 240, 247)])
    page = Page(Image.new("RGB", (width, height), paper), (0, 0, 0))
    _, shapes = shapes_page(rng, width, height, rng.randint(2, 5), page=page)
    return Drawn(page.image, [], shapes, [])


def film(rng: random.Random, book: FontBook) -> tuple[list[Image.Image], list[str]]:
    """Two to four words, two or four frames each, cut after ten frames; and the words that are then to be seen."""
    ink, paper = rng.choice([((25, 25, 25), (255, 255, 255)), *HELD_OUT_COLORS])
    font = font_of_height(book.pick(rng), rng.choice(HEIGHTS))
    width, height = rng.choice([(320, 240), (360, 200), (300, 260)])
    frames: list[tuple[Image.Image, str]] = []
    for _ in range(rng.randint(2, 4)):
        text = clip(words.short(rng, 9), font, width - 30)
        if frames and text == frames[-1][1]:
            continue
        page = Page(Image.new("RGB", (width, height), paper), ink)
        page.draw.line((0, height - 30, width, height - 30), fill=ink, width=2)
        page.text((width - length(font, text)) / 2, height / 2, text, font)
        frames += [(page.image, text)] * rng.choice([2, 4])
    frames = frames[:10]  # a long last word goes with its frames
    return [image for image, _ in frames], [text for text, _ in itertools.groupby(text for _, text in frames)]


def markdown(cells: list[list[str]]) -> str:
    rows = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([rows[0], "|" + " --- |" * len(cells[0]), *rows[1:]])
