"""translate: pictures in one question, texts in parts, and mistakes told before anything is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks import Translate, each, translate
from qvl.tasks.translation import split
from qvl.types import TextPart
from tests.tasks.scripted import Scripted


def test_a_picture(samples: Path) -> None:
    model = Scripted(["```\n营业中\n8点到17点\n```"])
    assert translate(samples / "open.png", "zh", model=model) == "营业中\n8点到17点"
    assert model.prompts() == ["Translate the text in the picture into Chinese. Answer with the translation only."]
    assert model.media() == [samples / "open.png"]


def test_a_text_is_translated_part_by_part() -> None:
    text = "First.\n\n" + "word " * 900 + "\n\n\nLast."
    model = Scripted([lambda messages: messages[-1].parts[0].text.split("\n\n", 1)[1].upper()])  # type: ignore[union-attr]
    assert translate(TextPart(text), "fr", model=model) == text.strip().upper()
    assert len(model.asked) == 2
    assert all("into French" in prompt for prompt in model.prompts())
    assert model.media() == []


def test_a_fence_of_the_text_itself_stays() -> None:
    assert translate(TextPart("```\nx = 1\n```"), model=Scripted(["```\nx = 1\n```"])) == "```\nx = 1\n```"
    assert translate(TextPart("x"), model=Scripted(["```\ny\n```"])) == "y"


def test_what_a_model_says_around_a_translation_goes(samples: Path) -> None:
    answer = "Sure! Here is the translation:\n\n营业中\n\nLet me know if you need more."
    assert translate(samples / "open.png", "zh", model=Scripted([answer])) == "营业中"
    assert translate(TextPart("Open"), "zh", model=Scripted(["翻译：营业中"])) == "营业中"


@pytest.mark.parametrize("source", [TextPart("Open"), TextPart("```\nx\n```")])
def test_an_empty_translation_is_none(source: TextPart) -> None:
    with pytest.raises(BadAnswer, match="empty answer"):
        translate(source, "zh", model=Scripted(["\n"]))


def test_a_cut_part_is_told_once() -> None:
    [outcome] = each(Translate(), TextPart("a " * 4000), model=Scripted(["x"], "length"))
    assert outcome.result is not None
    assert len(outcome.result.notes) == 1


def test_nothing_to_translate_and_no_such_language() -> None:
    with pytest.raises(InvalidRequest, match="no text"):
        translate(TextPart(" \n"), model=Scripted(["x"]))
    model = Scripted(["x"])
    with pytest.raises(InvalidRequest, match="'zz' is no language"):
        translate(TextPart("x"), "zz", model=model)
    assert model.asked == []


@given(st.text("ab. \n中。", max_size=200), st.integers(4, 50))
def test_the_parts_are_the_text(text: str, size: int) -> None:
    parts = split(text, size)
    assert "".join(part + gap for part, gap in parts) == text.strip()
    assert all(len(part) <= size for part, _ in parts)
    assert all(gap.strip() == "" for _, gap in parts)


def test_parts_end_where_paragraphs_do() -> None:
    assert split("one two\n\nthree four\nfive", 20) == [("one two", "\n\n"), ("three four\nfive", "")]
    assert split("One two. Three four.", 12) == [("One two.", " "), ("Three four.", "")]
    assert split("x" * 25, 10) == [("x" * 10, ""), ("x" * 10, ""), ("x" * 5, "")]
