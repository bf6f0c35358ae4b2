"""ocr: the bundled checkpoint reads, and what a model adds to the text goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from qvl.tasks import Ocr, ocr
from qvl.tasks.text import PROMPTS
from tests.tasks.scripted import Scripted

if TYPE_CHECKING:
    from qvl import LLM

QUESTIONS = json.loads((Path(__file__).resolve().parents[2] / "samples" / "questions.json").read_text(encoding="utf-8"))
READ = {one["media"][0]: one["answer"] for one in QUESTIONS if one["ask"] == "Read the text."}


@pytest.mark.parametrize("lang", PROMPTS)
@pytest.mark.parametrize("name", READ)
def test_the_bundled_checkpoint_reads_its_samples(demo: LLM, samples: Path, name: str, lang: str) -> None:
    assert ocr(samples / name, lang=lang, model=demo) == READ[name]  # type: ignore[arg-type]


def test_a_picture_in_every_form(demo: LLM, samples: Path) -> None:
    path = samples / "open.png"
    picture = Image.open(path).convert("RGB")
    for source in (path, str(path), path.read_bytes(), picture, np.asarray(picture)):
        assert ocr(source, model=demo) == READ["open.png"]


def test_what_is_asked(samples: Path) -> None:
    for lang, prompt in PROMPTS.items():
        model = Scripted(["x"])
        ocr(samples / "open.png", lang=lang, model=model)
        assert model.prompts() == [prompt]
        assert model.asked[0][1].temperature == 0.0


@pytest.mark.parametrize(
    "answer, text",
    [("```\nA\n  B\n```", "A\n  B"), ("\nA  \nB\t\n\n", "A\nB"), ("", ""), ("  indented\nline", "  indented\nline")],
)
def test_layout_stays_and_wrappings_go(answer: str, text: str) -> None:
    assert Ocr().read(answer) == text
