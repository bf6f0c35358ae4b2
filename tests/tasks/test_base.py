"""What a task sends, and code fences off what comes back."""

from __future__ import annotations

import pytest

from qvl.tasks import Ocr
from qvl.tasks.base import CUT, asked, certain, cut_notes, fenced, unfenced
from qvl.types import Answer, Completion, MediaPart, TextPart, Usage

PICTURE = MediaPart("image", b"x")


def test_pictures_come_first_and_a_text_stands_below_the_prompt() -> None:
    [turn] = asked("Read.", [PICTURE])
    assert turn.parts == (PICTURE, TextPart("Read."))
    [turn] = asked("Translate.", [TextPart("Hallo")])
    assert turn.parts == (TextPart("Translate.\n\nHallo"),)
    system, turn = asked("Read.", [PICTURE], system="Be brief.")
    assert (system.role, system.parts) == ("system", (TextPart("Be brief."),))


@pytest.mark.parametrize(
    "answer, inside",
    [
        ("plain", "plain"),
        ("```\ntext\n```", "text"),
        ("```json\n{}\n```\n", "{}"),
        ("~~~md\na\n\nb\n~~~", "a\n\nb"),
        ("```\ncut off", "cut off"),
        ("````\n```\ninner\n```\n````", "```\ninner\n```"),
        ("a ```code``` b", "a ```code``` b"),
        ("```\none\n```\nand\n```\ntwo\n```", "```\none\n```\nand\n```\ntwo\n```"),
        ("", ""),
    ],
)
def test_a_fence_around_all_of_it_goes(answer: str, inside: str) -> None:
    assert unfenced(answer) == inside


@pytest.mark.parametrize(
    "answer, stays",
    [
        ("", ""),
        (" \n", ""),
        ("OPEN", "OPEN"),
        ("OPEN \n", "OPEN"),
        ("``", ""),
        ("```", ""),
        (" ```python", ""),
        ("```\nOPEN", "```\nOPEN"),
        ("```\nOPEN\n``", "```\nOPEN"),
        ("say `x`", "say `x"),
        ("`x` is it", "`x` is it"),
    ],
)
def test_what_stays_of_an_answer_that_is_still_coming(answer: str, stays: str) -> None:
    assert certain(answer) == stays


def test_the_first_fence_of_an_answer_that_also_talks() -> None:
    assert fenced("Here it is:\n```json\n{}\n```\nGood luck!") == "{}"
    assert fenced("```\none\n```\nand\n```\ntwo\n```") == "one"
    assert fenced("  no fence  ") == "  no fence  "


def test_a_cut_answer_is_noted() -> None:
    for reason, notes in (("stop", ()), ("length", (CUT,))):
        answer = Answer(0, "x", (), reason)  # type: ignore[arg-type]
        assert cut_notes(Completion((answer,), Usage())) == notes


def test_sampling_is_greedy_and_as_long_as_asked() -> None:
    assert (Ocr().sampling.temperature, Ocr().sampling.max_tokens) == (0.0, 2048)
    assert Ocr(lang="zh").with_max_tokens(7) == Ocr(lang="zh", max_tokens=7)
    assert Ocr().with_max_tokens(None) == Ocr()
