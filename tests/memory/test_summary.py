"""The words around a summary."""

from __future__ import annotations

import pytest

from qvl.memory.summary import (
    WRAPPING_TOKENS,
    SummaryFailed,
    read_summary,
    summary_messages,
    summary_sampling,
    with_summary,
)
from qvl.types import MediaPart, Message, TextPart
from tests.memory.scripted import completion, media_of, picture, said, text_of, user


def test_pictures_are_shown_beside_their_numbers() -> None:
    video = MediaPart("video", "v")
    talk = [user(picture("a"), picture("b"), "two"), said("yes"), user(video, picture("c"), "and?"), said("no")]
    system, asked = summary_messages(talk, (2, 3), "", 100)
    assert "Describe every picture" in text_of(system)
    assert media_of([asked]) == ["v", "c"]
    kinds = [type(part) for part in asked.parts]
    assert kinds == [TextPart, MediaPart, TextPart, MediaPart, TextPart]
    assert asked.parts[0].text.endswith("User: [Video 1] ")  # type: ignore[union-attr]
    assert asked.parts[2].text == " [Picture 3] "  # type: ignore[union-attr]
    assert "Summary so far" not in text_of(asked)


def test_without_media_they_are_named() -> None:
    talk = [user(picture("a"), "what?"), said("a cat")]
    _, asked = summary_messages(talk, (0, 1), "Before.", 100, with_media=False)
    assert media_of([asked]) == []
    assert "[Picture 1, not shown here]" in text_of(asked)
    assert "Summary so far:\nBefore." in text_of(asked)


@pytest.mark.parametrize(
    ("texts", "chinese"),
    [
        (["你好，请看这张图片", "好的"], True),
        (["What is 你好?", "A greeting in Chinese"], False),
        (["请帮我读一下 invoice 2024 的总金额", "总金额是 12.50 美元"], True),
        (["この写真は何ですか", "猫です"], False),
        (["Что это?", "Кошка"], False),
        (["", ""], False),
    ],
)
def test_the_language_is_the_conversations(texts: list[str], chinese: bool) -> None:
    system, asked = summary_messages([user(texts[0]), said(texts[1])], (0, 1), "", 100)
    assert ("摘要" in text_of(system)) == chinese
    assert ("助手：" in text_of(asked)) == chinese


def test_the_instructions_name_a_length_that_fits() -> None:
    (system, _), sampling = summary_messages([user("x")], (0,), "", 200), summary_sampling(200)
    assert "at most 84 words" in text_of(system)
    assert sampling.max_tokens == 200 - WRAPPING_TOKENS


def test_a_summary_goes_before_a_turns_own_words() -> None:
    turn = with_summary(user("And now?", picture("a")), "Fruit.")
    assert turn.role == "user"
    assert text_of(turn) == "[Summary of the conversation so far]\nFruit.\n[End of the summary]\n\nAnd now?"
    first = with_summary(user(picture("a"), "And now?"), "Fruit.")
    assert [type(part) for part in first.parts] == [TextPart, MediaPart, TextPart]


def test_read_summary() -> None:
    assert read_summary(completion(" They met. \n")) == "They met."
    for made in (completion(""), completion("x", reason="length"), completion("x", reason="error")):
        with pytest.raises(SummaryFailed):
            read_summary(made)


def test_tool_turns_have_a_name() -> None:
    _, asked = summary_messages([Message("tool", (TextPart("42"),))], (0,), "", 100)
    assert "Tool result: 42" in text_of(asked)
