"""Lines with their boxes, and pages set out as they look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qvl.tasks import OcrLines, TextLine, each, layout, ocr_lines
from qvl.tasks.text_lines import FIND
from qvl.types import PictureRule
from tests.tasks.scripted import Messages, Scripted
from tests.test_samples import overlap

if TYPE_CHECKING:
    from qvl import LLM


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.png"
    Image.new("RGB", (560, 280), "white").save(path)
    return path


def test_the_bundled_checkpoint_finds_the_lines_that_it_reads(demo: LLM, samples: Path) -> None:
    lines = ocr_lines(samples / "sample.png", model=demo)
    assert [line.text for line in lines] == ["Meeting at 10:30", "Room 204, second floor", "Bring the blue folder"]
    for line, box in zip(lines, ink(samples / "sample.png"), strict=True):
        assert line.box is not None and overlap(list(line.box), box) > 0.6, (line, box)
    assert layout(lines) == "Meeting at 10:30\nRoom 204, second floor\nBring the blue folder"


def ink(path: Path) -> list[list[float]]:
    """The boxes of the lines of print in a picture, found by looking at it."""
    grey = np.asarray(Image.open(path).convert("L"), int)
    marked = np.abs(grey - grey[0, 0]) > 60
    edges = np.flatnonzero(np.diff(np.pad(marked.any(axis=1), 1).astype(int)))
    boxes = []
    for top, bottom in zip(edges[::2], edges[1::2], strict=True):
        columns = np.flatnonzero(marked[top:bottom].any(axis=0))
        boxes.append([float(columns[0]), float(top), float(columns[-1] + 1), float(bottom)])
    return boxes


def boxed(text: str, x1: int, y1: int, x2: int, y2: int) -> str:
    return f"<|object_ref_start|>{text}<|object_ref_end|><|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def test_line_by_line(page: Path) -> None:
    """Thousandths of 560 x 280 pixels; a line that stands there twice gets a box each, one that is not found none."""
    places = {
        "Total": boxed("Total", 0, 500, 100, 600) + boxed("Total", 0, 100, 100, 200),
        "12.50": boxed("12.50", 500, 100, 600, 200),
        "Lost": "I cannot see that.",
    }

    def answer(messages: Messages) -> str:
        prompt = messages[-1].parts[-1].text  # type: ignore[union-attr]
        return next((found for text, found in places.items() if FIND.format(what=text) == prompt), "?")

    model = Scripted(["Total\n12.50\n\nTotal\nLost", answer])
    [outcome] = each(OcrLines(), page, model=model)
    assert outcome.result is not None
    assert outcome.result.data == [
        {"text": "Total", "box": [0, 28, 56, 56]},
        {"text": "12.50", "box": [280, 28, 336, 56]},
        {"text": "Total", "box": [0, 140, 56, 168]},
        {"text": "Lost", "box": None},
    ]
    assert any("Lost: none found" in note for note in outcome.result.notes)
    assert len(model.asked) == 4


class Named(Scripted):
    """Tells that it is a Qwen2.5-VL, and how it sees pictures."""

    model = "Qwen2.5-VL-7B-Instruct"

    def picture_rule(self) -> PictureRule:
        return PictureRule(28, 56 * 56, 280 * 140)

    def context(self) -> int:
        return 4096


def test_a_model_that_writes_json_is_asked_once(page: Path) -> None:
    """Its pixels are those of the picture as it sees it: half of ours."""
    model = Named(['```json\n[{"bbox_2d": [10, 20, 110, 40], "text_content": "Hello"}]\n```'])
    assert ocr_lines(page, model=model) == (TextLine("Hello", (20, 40, 220, 80)),)
    [prompt] = model.prompts()
    assert prompt.startswith("Spot all the text in the picture")


def line(text: str, left: int, top: int, width: int | None = None) -> TextLine:
    return TextLine(text, (left, top, left + (width or 10 * len(text)), top + 20))


def test_columns_stand_beside_each_other() -> None:
    lines = (line("Item", 0, 0), line("Apples", 0, 30), line("Price", 200, 2), line("240", 200, 29))
    assert layout(lines) == "Item                Price\nApples              240"


def test_gaps_indents_and_lines_without_a_place() -> None:
    lines = (line("Title", 100, 0), line("first", 3, 80), TextLine("unplaced", None), line("second", 0, 110))
    assert layout(lines) == "          Title\n\nfirst\nunplaced\nsecond"
    assert layout((TextLine("a", None), TextLine("b", None))) == "a\nb"
    assert layout(()) == ""


def test_touching_columns_stay_apart() -> None:
    assert layout((line("abcdef", 0, 0), line("gh", 61, 0))) == "abcdef  gh"


@pytest.mark.parametrize("to, several, suffix", [("json", "json", ".json"), ("layout", "headings", ".txt")])
def test_what_is_printed(page: Path, to: str, several: str, suffix: str) -> None:
    task = OcrLines(to=to)  # type: ignore[arg-type]
    [outcome] = each(task, page, model=Scripted(["Hi", boxed("Hi", 0, 0, 100, 100)]))
    assert outcome.result is not None
    assert (task.several, task.suffix) == (several, suffix)
    expected = [{"text": "Hi", "box": [0, 0, 56, 28]}]
    assert (json.loads(outcome.result.text) if to == "json" else outcome.result.text) == (
        expected if to == "json" else "Hi"
    )
