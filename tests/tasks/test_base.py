"""What a task sends, and what it says about an answer that is empty or cut."""

from __future__ import annotations

import pytest

from qvl.errors import BadAnswer
from qvl.tasks import Ocr
from qvl.tasks.base import CUT, asked, cut_notes, said
from qvl.types import Answer, Completion, MediaPart, TextPart, Usage

PICTURE = MediaPart("image", b"x")


def test_pictures_come_first_and_a_text_stands_below_the_prompt() -> None:
    [turn] = asked("Read.", [PICTURE])
    assert turn.parts == (PICTURE, TextPart("Read."))
    [turn] = asked("Translate.", [TextPart("Hallo")])
    assert turn.parts == (TextPart("Translate.\n\nHallo"),)
    system, turn = asked("Read.", [PICTURE], system="Be brief.")
    assert (system.role, system.parts) == ("system", (TextPart("Be brief."),))


def test_an_empty_answer_is_none() -> None:
    assert said(" yes\n") == "yes"
    with pytest.raises(BadAnswer, match="empty answer"):
        said(" \n")


def test_a_cut_answer_is_noted() -> None:
    for reason, notes in (("stop", ()), ("length", (CUT,))):
        answer = Answer(0, "x", (), reason)  # type: ignore[arg-type]
        assert cut_notes(Completion((answer,), Usage())) == notes


def test_sampling_is_greedy_and_as_long_as_asked() -> None:
    assert (Ocr().sampling.temperature, Ocr().sampling.max_tokens) == (0.0, 2048)
    assert Ocr(lang="zh").with_max_tokens(7) == Ocr(lang="zh", max_tokens=7)
    assert Ocr().with_max_tokens(None) == Ocr()
