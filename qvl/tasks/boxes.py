"""Boxes, quads and points in a model's answer, and where they lie in the picture that the user sent.

Knows how the Qwen-VL models write coordinates: Qwen2-VL `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` in thousandths of the
picture; Qwen2.5-VL JSON with `bbox_2d` or `point_2d` in pixels of the resized picture; Qwen3-VL the same JSON in
thousandths; points as XML. Does not know pictures, prompts or servers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from qvl.tasks.loose_json import read_at

# Thousandths of the picture, pixels of the resized picture, or shares of the picture (0 to 1).
Convention: TypeAlias = Literal["relative", "absolute", "share"]
Shape: TypeAlias = Literal["box", "quad", "point"]
Size: TypeAlias = tuple[int, int]  # width, height
Point: TypeAlias = tuple[int, int]

THOUSANDTHS = 1000
_SHAPES: dict[int, Shape] = {2: "point", 4: "box", 8: "quad"}  # by how many numbers there are

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_PAIR = rf"\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
_TOKENS = re.compile(
    r"(?:<\|object_ref_start\|>|<ref>)(?P<label>[^<]*)(?:<\|object_ref_end\|>|</ref>)"
    r"|(?:<\|(?P<new>box|quad)_start\|>|<(?P<old>box|quad)>)(?P<inside>[^<]*)(?P<end><\|(?:box|quad)_end\|>|</(?:box|quad)>)?"
)
_INSIDE = re.compile(rf"[\s()\[\],]*(?:{_NUMBER}[\s()\[\],]+)*(?:{_NUMBER})?[\s()\[\],]*")
_XML = re.compile(r"<points?\b(?P<fields>[^>]*)>(?:(?P<label>[^<]*)</points?>)?")
_XML_FIELD = re.compile(r"""([a-z]+)(\d*)\s*=\s*["']([^"']*)["']""")
_RUN = re.compile(rf"{_PAIR}(?:\s*,\s*{_PAIR})+")
_LONE_POINT = re.compile(rf"\W*{_PAIR}\W*")
_TRACES = re.compile(
    r"(?:box|quad)(?:_start)?\|?>|bbox|point_2d|<points?\b|[(\[]\s*[-+]?\d+(?:\.\d+)?\s*,\s*[-+]?\d|\bx_?(?:1|min)\b"
)
_WIDE = str.maketrans("（），：［］", "(),:[]")
_EDGES = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"),
          ("left", "top", "right", "bottom"))  # fmt: skip

_JSON_SHAPES: dict[str, tuple[Shape, int]] = {
    "bbox_2d": ("box", 4),
    "bbox": ("box", 4),
    "bboxes": ("box", 4),
    "box": ("box", 4),
    "quad": ("quad", 8),
    "point_2d": ("point", 2),
    "point": ("point", 2),
}
_JSON_LABELS = ("label", "name", "object", "text_content", "text")


@dataclass(frozen=True, slots=True)
class Mark:
    """A shape as the model wrote it: x and y in turns, in the model's own units. An empty label: it gave none."""

    label: str
    shape: Shape
    numbers: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """An object in pixels of the original picture, x before y. `box` is (left, top, right, bottom), None for a point.

    `quad` has four corners where the model gave them; `box` is then the upright rectangle around them.
    """

    label: str
    box: tuple[int, int, int, int] | None
    quad: tuple[Point, ...] | None = None
    point: Point | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what was not given is left out."""
        told: dict[str, Any] = {"label": self.label}
        if self.box is not None:
            told["box"] = list(self.box)
        if self.quad is not None:
            told["quad"] = [list(corner) for corner in self.quad]
        if self.point is not None:
            told["point"] = list(self.point)
        return told


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found in an answer; `unread` are pieces that look like coordinates and are not understood."""

    marks: tuple[Mark, ...]
    unread: tuple[str, ...] = ()
    has_tokens: bool = False  # it was written with box tokens


def read_marks(answer: str) -> Reading:
    """The marks of an answer, whichever way it writes them. Neither marks nor anything unread: nothing was found."""
    try:
        for text in dict.fromkeys((answer, answer.translate(_WIDE))):
            for reader in (_read_tokens, _read_json, _read_xml, _read_bare):
                reading = reader(text)
                if reading.marks or reading.unread:
                    return reading
        looks_broken = _TRACES.search(answer) is not None and not _is_empty_json(answer)
    except RecursionError:  # JSON nested beyond all bounds
        looks_broken = True
    return Reading((), (answer,) if looks_broken else ())


def guess_convention(model: str, reading: Reading) -> tuple[Convention, bool]:
    """The convention of a model by its name, else by how it answered; and whether that is certain."""
    numbers = [number for mark in reading.marks for number in mark.numbers]
    if numbers and all(0 <= number <= 1 for number in numbers) and not all(map(float.is_integer, numbers)):
        return "share", True  # no model is taught so, but small ones do it, whatever their name
    name = model.lower()
    if re.search(r"qwen[-_]?2[._-]?5[-_]?vl", name):
        return "absolute", True
    if reading.has_tokens or re.search(r"qwen[-_]?[23][-_]?vl", name):
        return "relative", True
    return "absolute", False


def place(mark: Mark, convention: Convention, original: Size, resized: Size) -> Found | None:
    """A mark in the original picture, corners in order and within it; None when it lies outside altogether.

    `resized` is the size that the model saw. A box has at least one pixel.
    """
    units = {"relative": (THOUSANDTHS, THOUSANDTHS), "share": (1, 1), "absolute": resized}[convention]
    scale = [side / unit for side, unit in zip(original, units, strict=True)]
    xs = [x * scale[0] for x in mark.numbers[::2]]
    ys = [y * scale[1] for y in mark.numbers[1::2]]
    width, height = original
    if min(xs) > width or max(xs) < 0 or min(ys) > height or max(ys) < 0:
        return None
    if mark.shape == "point":
        return Found(mark.label, None, point=(_within(xs[0], width - 1), _within(ys[0], height - 1)))
    left, right = _span(min(xs), max(xs), width)
    top, bottom = _span(min(ys), max(ys), height)
    corners = tuple((_within(x, width), _within(y, height)) for x, y in zip(xs, ys, strict=True))
    return Found(mark.label, (left, top, right, bottom), quad=corners if mark.shape == "quad" else None)


def _within(value: float, most: int) -> int:
    return max(0, min(most, round(value)))


def _span(low: float, high: float, side: int) -> tuple[int, int]:
    """Both ends within the picture, at least a pixel apart."""
    first = min(_within(low, side), side - 1)
    return first, max(_within(high, side), first + 1)


def _mark(label: str, shape: Shape, numbers: Sequence[float]) -> Mark | None:
    label = " ".join(label.split())
    return Mark(label, shape, tuple(numbers)) if all(map(math.isfinite, numbers)) else None


def _read_tokens(answer: str) -> Reading:
    """`<|object_ref_start|>dogs<|object_ref_end|>`, then any number of boxes; Qwen-VL's `<ref>` and `<box>` too."""
    marks: list[Mark] = []
    unread: list[str] = []
    label = ""
    for match in _TOKENS.finditer(answer):
        if match["label"] is not None:
            label = match["label"]
            continue
        kind, inside = match["new"] or match["old"], match["inside"]
        numbers = [float(number) for number in re.findall(_NUMBER, inside)] if _INSIDE.fullmatch(inside) else []
        step = 8 if kind == "quad" else 4 if len(numbers) > 2 else 2
        parts = [_mark(label, _SHAPES[step], numbers[i : i + step]) for i in range(0, len(numbers), step)]
        is_cut = match["end"] is None and (step == 2 or not inside.rstrip().endswith(")"))
        if not numbers or len(numbers) % step or None in parts or is_cut:
            unread.append(match[0])
        else:
            marks += [part for part in parts if part is not None]
    return Reading(tuple(marks), tuple(unread), has_tokens=True)


def _read_json(answer: str) -> Reading:
    """Objects with `bbox_2d` and the like, wherever they stand; those before the place where an answer was cut, too."""
    marks: list[Mark] = []
    unread: list[str] = []
    for thing in _json_values(answer, "{"):
        _collect(thing, marks, unread)
    if not marks and not unread:
        for thing in _json_values(answer, "["):
            _collect_bare(thing, marks)
    return Reading(tuple(marks), tuple(unread))


def _json_values(text: str, opening: str) -> Iterator[Any]:
    """Every complete JSON value that begins with `opening`, the outermost ones."""
    decoder = json.JSONDecoder()
    start = text.find(opening)
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
            yield value
        except ValueError:
            try:
                value, end = read_at(text, start)
                yield value
            except ValueError:
                end = start + 1
        start = text.find(opening, end)


def _collect(thing: Any, marks: list[Mark], unread: list[str]) -> None:
    """The marks of a JSON value and of everything in it."""
    if isinstance(thing, list):
        for item in thing:
            _collect(item, marks, unread)
    if not isinstance(thing, dict):
        return
    label = next((str(thing[key]) for key in _JSON_LABELS if isinstance(thing.get(key), str)), "")
    if (edges := _edges(thing)) is not None:
        thing = {**thing, "bbox": edges}
    for key, value in thing.items():
        if key not in _JSON_SHAPES:
            _collect(value, marks, unread)
        elif value not in (None, []):
            shape, count = _JSON_SHAPES[key]
            numbers = _flat(value)
            found = [_mark(label, shape, numbers[i : i + count]) for i in range(0, len(numbers), count)]
            if not numbers or len(numbers) % count or None in found:
                unread.append(json.dumps(thing, ensure_ascii=False))
            else:
                marks += [mark for mark in found if mark is not None]


def _collect_bare(thing: Any, marks: list[Mark]) -> None:
    """`[x1, y1, x2, y2]`, or a list of such lists."""
    numbers = _flat(thing)
    nested = bool(thing) and all(isinstance(item, list) and len(item) == 4 for item in thing)
    if len(numbers) == 4 or (nested and len(numbers) == 4 * len(thing)):
        found = [_mark("", "box", numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
        marks += [mark for mark in found if mark is not None]


def _flat(value: Any) -> list[float]:
    """The numbers of a list, of a list of lists too, or of named edges; empty when there is anything else in it."""
    if isinstance(value, dict):
        value = _edges(value)
    if not isinstance(value, list):
        return []
    numbers: list[float] = []
    for item in value:
        inner = _flat(item) if isinstance(item, list) else [_number(item)]
        if not inner:
            return []
        numbers += inner
    return numbers


def _edges(thing: dict[str, Any]) -> list[Any] | None:
    """`{"x1": ..., "y1": ..., "x2": ..., "y2": ...}` and its like as a list."""
    return next(([thing[key] for key in keys] for keys in _EDGES if all(key in thing for key in keys)), None)


def _number(item: Any) -> float:
    """Not a number (nan) for what is none; models write numbers in quotes now and then."""
    try:
        return math.nan if isinstance(item, bool) else float(item)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _read_xml(answer: str) -> Reading:
    """`<points x1="10" y1="20" x2="30" y2="40" alt="dogs">dogs</points>`."""
    marks: list[Mark] = []
    unread: list[str] = []
    for match in _XML.finditer(answer):
        fields = {(name, number): value for name, number, value in _XML_FIELD.findall(match["fields"])}
        label = match["label"] or fields.get(("alt", ""), "")
        keys = [number for name, number in fields if name == "x"]
        found = [_mark(label, "point", (_number(fields["x", key]), _number(fields.get(("y", key))))) for key in keys]
        if not found or None in found:
            unread.append(match[0])
        marks += [mark for mark in found if mark is not None]
    return Reading(tuple(marks), tuple(unread))


def _read_bare(answer: str) -> Reading:
    """`the dog(10,20),(30,40)`: what is left of box tokens where a server takes special tokens out of its answers."""
    if _LONE_POINT.fullmatch(answer):
        lone = _mark("", "point", [float(number) for number in re.findall(_NUMBER, answer)])
        return Reading(() if lone is None else (lone,))
    marks: list[Mark] = []
    unread: list[str] = []
    label, end = "", 0
    for match in _RUN.finditer(answer):
        before = answer[end : match.start()].rpartition("\n")[2].strip(" \t:,;.-*")
        label, end = before or label, match.end()
        numbers = [float(number) for number in re.findall(_NUMBER, match[0])]
        mark = _mark(label, _SHAPES[len(numbers)], numbers) if len(numbers) in _SHAPES else None
        if mark is None:
            unread.append(match[0])
        else:
            marks.append(mark)
    return Reading(tuple(marks), tuple(unread), has_tokens=bool(marks))


def _is_empty_json(answer: str) -> bool:
    """`[]`, `{"bbox_2d": []}` and the like: a model's way of saying that there is none."""
    values = [*_json_values(answer, "{"), *_json_values(answer, "[")]
    return bool(values) and not any(_flat(value) for value in values) and not re.search(r"\d\s*,\s*\d", answer)
