"""`webpage`: a screenshot made into one HTML file that opens by itself, and how close it came.

Knows the question, and what makes an answer a page: `page` reads it, `browser` shows it. Does not know files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from PIL import Image, ImageDraw

from qvl.errors import BadAnswer
from qvl.tasks.base import Ask, Model, Result, Task, asked, cut_notes
from qvl.tasks.browser import render
from qvl.tasks.fonts import font_for
from qvl.tasks.page import Page, self_contained
from qvl.tasks.pictures import pixels_of
from qvl.tasks.run import one
from qvl.tasks.wrappings import fences, unfenced
from qvl.types import MediaPart, Part

PROMPT = (
    "Write an HTML page that looks like this screenshot: the same layout, colours, sizes and texts. Put everything "
    "into one file, with the CSS in a <style> element. Use no scripts and no external files, fonts or pictures; where "
    "the screenshot shows a picture, put a <div> of its size and main colour. Answer with the HTML only."
)
SIZE = " The screenshot is {width} x {height} pixels."
_PAGE = re.compile(r"<!doctype\b|<html\b", re.I)
_TAG = re.compile(r"<[a-z]", re.I)
_SHEET = re.compile(r"[\w*.#:\]]\s*\{[^{}]*:[^{}]*\}")  # a rule of CSS
_SHOWN_ANSWER = 300
_GAP, _BAND = 16, 40  # pixels between two pictures, and above them
_LIGHT, _INK = (236, 236, 236), (40, 40, 40)


@dataclass(frozen=True, kw_only=True)
class Webpage(Task[Page]):
    """One self-contained page for each screenshot."""

    name: ClassVar[str] = "webpage"

    max_tokens: int = 4096

    @property
    def suffix(self) -> str:
        return ".html"

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        return "json"

    @property
    def prompt(self) -> str:
        return PROMPT

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Page]:
        part = next(part for part in parts if isinstance(part, MediaPart))
        height, width = pixels_of(part).shape[:2]
        question = self.prompt + SIZE.format(width=width, height=height)
        completion = ask(asked(question, (part,)), self.sampling)
        page = self.read(completion.text)
        notes = list(cut_notes(completion))
        if page.closed:
            notes.append(f"the page was not complete; closed: {', '.join(page.closed)}")
        if page.removed:
            notes.append(f"taken out, since one file holds all of the page: {', '.join(map(_short, page.removed))}")
        return self.result(page, tuple(notes))

    def read(self, answer: str) -> Page:
        page = self_contained(_html(answer))
        if page is None:
            shown = " ".join(answer.split())[:_SHOWN_ANSWER]
            raise BadAnswer(f"there is no HTML in the answer: {shown or '(empty)'}")
        return page

    def text(self, value: Page) -> str:
        return value.html

    def data(self, value: Page) -> dict[str, Any]:
        return {"html": value.html, "removed": list(value.removed), "closed": list(value.closed)}


def _html(answer: str) -> str:
    """The page in an answer that may talk, and may keep its style sheet in a code fence of its own."""
    pieces = [*fences(answer), unfenced(answer)]
    html = next((piece for known in (_PAGE, _TAG) for piece in pieces if known.search(piece)), answer)
    sheets = [piece for piece in pieces[:-1] if piece is not html and "<" not in piece and _SHEET.search(piece)]
    style = f"<style>\n{''.join(sheets)}\n</style>" if sheets else ""
    head = re.search(r"</head\s*>|<body\b", html, re.I) if style else None
    return f"{html[: head.start()]}{style}{html[head.start() :]}" if head else f"{style}{html}"


def _short(address: str) -> str:
    return address if len(address) <= 80 else f"{address[:77]}..."


def side_by_side(original: Image.Image, page: Page) -> Image.Image:
    """The screenshot, and to its right the page as a browser shows it in a window of the same size.

    Raises `ConfigError` where there is no browser, `RequestFailed` where it makes no picture.
    """
    width, height = original.size
    shown = render(page, width, height)
    canvas = Image.new("RGB", (2 * width + 3 * _GAP, height + _BAND + _GAP), _LIGHT)
    pen = ImageDraw.Draw(canvas)
    for left, picture, title in ((_GAP, original, "original"), (width + 2 * _GAP, shown, "page")):
        canvas.paste(picture.convert("RGB"), (left, _BAND))
        font = font_for([title], 20)
        if font is not None:
            pen.text((left, _BAND // 2), title, fill=_INK, font=font, anchor="lm")
    return canvas


def webpage(source: Any, *, model: Model | None = None, page: int | None = None) -> Page:
    """The page for a screenshot: `html` is the whole file, `removed` what it referred to elsewhere.

    `source` is a path, an address, bytes, a PIL picture, an array, or a `page` of a PDF. `model` is a `qvl.Client` or a
    `qvl.LLM`; None asks the server on this machine, else the bundled checkpoint, which cannot do this.
    """
    return one(Webpage(), source, model, page)
