"""`ocr --to json` and `--to layout`: every line of text with its place, and the page set out as it looks.

A model that writes boxes as JSON is asked once for all of it. Others read the text first and then find line by line,
which any checkpoint that can ground is able to; the picture is encoded once and cached. Does not know files.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, Literal

from qvl.errors import BadAnswer
from qvl.tasks.base import Ask, Model, Result, Task, asked, cut_notes
from qvl.tasks.boxes import Found
from qvl.tasks.grounding import Ground, Objects
from qvl.tasks.markdown_table import shown_width
from qvl.tasks.pictures import pixels_of
from qvl.tasks.run import one
from qvl.tasks.text import PROMPTS, Language, Ocr
from qvl.types import MediaPart, Part

# For Qwen2.5-VL and later, in the words of their own documents.
SPOT = (
    "Spot {what} in the picture, line by line. Report every line as JSON: "
    '[{"bbox_2d": [x1, y1, x2, y2], "text_content": "..."}]'
)
# For Qwen2-VL and the bundled checkpoint, which know these words.
FIND = 'Find the text "{what}".'
_ALL = "all the text"
_MOST_LINES = 200  # looked for one by one; a page has fewer
_GAP = 2.4  # heights of a line from the top of one to that of the next: above it, an empty line stands between
_SLACK = 0.3  # of a character: edges that are meant to be one differ by some pixels


@dataclass(frozen=True, slots=True)
class TextLine:
    """A line of text and its box (left, top, right, bottom) in pixels of the picture; None where it was not found."""

    text: str
    box: tuple[int, int, int, int] | None

    def as_dict(self) -> dict[str, Any]:
        return {"text": self.text, "box": None if self.box is None else list(self.box)}


Lines = tuple[TextLine, ...]


@dataclass(frozen=True, kw_only=True)
class OcrLines(Task[Lines]):
    """Lines in the order of reading. `to` is how they are printed: as JSON, or set out as on the page.

    `finder` holds what is known about the model's way with coordinates.
    """

    name: ClassVar[str] = "ocr"

    to: Literal["json", "layout"] = "json"
    lang: Language = "en"
    max_tokens: int = 4096
    finder: Ground = field(default_factory=lambda: Ground(what=_ALL, template=SPOT))

    @property
    def prompt(self) -> str:
        """What is asked first."""
        return self.finder.prompt if self.finder.writes_json else PROMPTS[self.lang]

    @property
    def suffix(self) -> str:
        return ".json" if self.to == "json" else ".txt"

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        return "json" if self.to == "json" else "headings"

    def for_model(self, model: Model) -> OcrLines:
        return dataclasses.replace(self, finder=self.finder.for_model(model))

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Lines]:
        if self.finder.writes_json:
            spotted = dataclasses.replace(self.finder, max_tokens=self.max_tokens).answer(ask, parts)
            return self.result(tuple(TextLine(found.label, found.box) for found in spotted.value), spotted.notes)
        part = next(part for part in parts if isinstance(part, MediaPart))
        picture = MediaPart("image", pixels_of(part))
        completion = ask(asked(self.prompt, (picture,)), self.sampling)
        texts = [line.strip() for line in Ocr().read(completion.text).splitlines() if line.strip()]
        lines, notes = self._found(ask, picture, texts)
        return self.result(lines, (*cut_notes(completion), *notes))

    def _found(self, ask: Ask, picture: MediaPart, texts: list[str]) -> tuple[Lines, tuple[str, ...]]:
        """Where each line is; one that stands there twice gets one box after the other, from the top."""
        notes: dict[str, None] = {}
        boxes: dict[str, Iterator[Found]] = {}
        for text in dict.fromkeys(texts[:_MOST_LINES]):
            objects, remarks = self._find(ask, picture, text)
            boxes[text] = iter(sorted(objects, key=lambda found: found.box[1] if found.box else 0))
            notes |= dict.fromkeys(remarks)
        if len(texts) > _MOST_LINES:
            notes[f"only the first {_MOST_LINES} of {len(texts)} lines were looked for"] = None
        lines = []
        for text in texts:
            found = next(boxes.get(text, iter(())), None)
            lines.append(TextLine(text, None if found is None else found.box))
        return tuple(lines), tuple(notes)

    def _find(self, ask: Ask, picture: MediaPart, text: str) -> tuple[Objects, tuple[str, ...]]:
        finder = dataclasses.replace(self.finder, what=text, template=FIND, max_tokens=512)
        try:
            result = finder.answer(ask, (picture,))
        except BadAnswer as error:
            return (), (error.message,)
        return result.value, result.notes

    def read(self, answer: str) -> Lines:
        """The lines of an answer that spots them, about a picture of 1000 x 1000 pixels."""
        return tuple(TextLine(found.label, found.box) for found in self.finder.read(answer))

    def text(self, value: Lines) -> str:
        return layout(value) if self.to == "layout" else json.dumps(self.data(value), ensure_ascii=False)

    def data(self, value: Lines) -> Any:
        return layout(value) if self.to == "layout" else [line.as_dict() for line in value]


def layout(lines: Lines) -> str:
    """The lines set out as on the page: columns beside each other, gaps as blanks and empty lines.

    A line without a place stands below the one that was read before it.
    """
    placed = [(line.text, line.box) for line in lines if line.box is not None and line.text]
    if not placed:
        return "\n".join(line.text for line in lines)
    wide = max(1e-6, median((box[2] - box[0]) / shown_width(text) for text, box in placed))
    high = median(box[3] - box[1] for _, box in placed)
    left = min(box[0] for _, box in placed)
    out: list[str] = []
    last_top: int | None = None
    for row in _rows(lines):
        top = min((line.box[1] for line in row if line.box is not None), default=None)
        if last_top is not None and top is not None and top - last_top > _GAP * high:
            out.append("")
        last_top = top if top is not None else last_top
        out.append(_set_out(row, left, wide))
    return "\n".join(out)


def _rows(lines: Lines) -> list[list[TextLine]]:
    """Lines that stand beside each other, from the top; those without a place follow what was read before them."""
    rows: list[list[TextLine]] = []
    ordered = sorted((line for line in lines if line.box is not None), key=_middle)
    for line in ordered:
        if rows and _beside(rows[-1][0], line):
            rows[-1].append(line)
        else:
            rows.append([line])
    before: TextLine | None = None
    for line in lines:
        if line.box is None:
            at = next((i for i, row in enumerate(rows) if any(other is before for other in row)), -1)
            rows.insert(at + 1, [line])
        before = line
    return rows


def _middle(line: TextLine) -> float:
    assert line.box is not None
    return (line.box[1] + line.box[3]) / 2


def _beside(one_: TextLine, other: TextLine) -> bool:
    """Whether the middle of one is within the height of the other."""
    assert one_.box is not None and other.box is not None
    return one_.box[1] <= _middle(other) <= one_.box[3] and other.box[1] <= _middle(one_) <= other.box[3]


def _set_out(row: list[TextLine], left: int, wide: float) -> str:
    text = ""
    for line in sorted(row, key=lambda line: line.box[0] if line.box else 0):
        column = int((line.box[0] - left) / wide + _SLACK) if line.box else 0
        text += " " * max(column - shown_width(text), 2 if text else 0) + line.text
    return text


def ocr_lines(source: Any, *, lang: Language = "en", model: Model | None = None, page: int | None = None) -> Lines:
    """The lines of text in a picture with their boxes, in its own pixels. `source`, `model` and `page` as for `ocr`.

    `qvl.tasks.layout` sets them out as text.
    """
    return one(OcrLines(lang=lang), source, model, page)
