"""What models put around an answer goes; what only looks like it stays."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.tasks.wrappings import bare, certain, fenced, fences, grown, unfenced

LABELS = ("translation", "译文")


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


def test_the_first_fence_of_an_answer_that_also_talks_and_all_of_them() -> None:
    assert fenced("Here it is:\n```json\n{}\n```\nGood luck!") == "{}"
    assert fenced("```\none\n```\nand\n```\ntwo\n```") == "one"
    assert fenced("  no fence  ") == "  no fence  "
    assert fences("```\none\n```\nand\n```css\ntwo\n```") == ["one", "two"]


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


TALK = [
    "Sure! Here is the translation:\n\n营业中",
    "Sure! Here's the translation of the text in the image to Chinese:\n\n营业中",
    "Here is the translated text in Chinese:\n\n营业中",
    "Certainly! The text in the picture translates to Chinese as follows:\n营业中",
    'The text in the picture translates to:\n\n"营业中"',
    "The translation of the text into Chinese is: 营业中",
    "Translation: 营业中",
    "**Translation:** 营业中",
    "Sure!\n\n营业中",
    "Here is the translation:\n```\n营业中\n```",
    "```markdown\n营业中\n```\n\nLet me know if you need more help!",
    "Here is the translation:\n\n营业中\n\nI hope this helps! Feel free to ask for more.",
    "当然！以下是翻译：\n营业中",
    "好的，以下是图片中文字的中文翻译：\n\n“营业中”\n\n如果您还需要其他帮助，请随时告诉我。",
    "图中的文字翻译成中文是：营业中",
    "翻译如下：\n营业中",
    "译文：营业中",
    "The text in the picture reads:\n\n营业中",
    "图片中的文字内容如下：\n营业中",
]


@pytest.mark.parametrize("answer", TALK)
def test_talk_goes(answer: str) -> None:
    assert bare(answer, *LABELS) == "营业中"


@pytest.mark.parametrize(
    "answer",
    [
        "OPEN\n8 to 17",
        "Meeting at 10:30",
        "Text: 555-1234",
        "Photo: John Smith",
        "Text and picture: J. Smith",
        "Text in English: good morning",
        "Contents:\n1 Introduction",
        "The following is to be done: wash",
        "Here is the plan:\n\nwash",
        "The translation of this work is copyrighted: ask first",
        "OK: press here",
        "Sure thing",
        '"To be or not to be"',
        "图：北京",
        "以下内容：略",
        "内容：苹果",
        "下面是重点：苹果",
        "Dear all,\n\nlet me know if you come.",
        "Here is the translation:",
        "Sure!\n",
        "x = {\n```\n}",
        "",
    ],
)
def test_what_only_looks_like_talk_stays(answer: str) -> None:
    assert bare(answer) == answer


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Sure! ", "Here is ", "the translation", " of the picture", ":", "\n", "\n\n", "营业中", '"', "OPEN",
             "图中的文字", "：", "Let me know", "```\n", " ", "8 to 17"]
        ),
        max_size=8,
    ).map("".join)
)  # fmt: skip
def test_what_is_shown_while_it_comes_is_how_it_begins(answer: str) -> None:
    """But for fences that more talk follows: whether they are part of the answer is known at its end only."""
    whole = bare(answer, *LABELS)
    if "```" in answer:
        return
    for end in range(len(answer) + 1):
        assert whole.lstrip().startswith(grown(answer[:end], *LABELS).strip()), answer[:end]


@pytest.mark.parametrize("piece", [" ", "\n", "\n ", "* ", "```\n", "Sure! ", "图", ": ", '"'])
@pytest.mark.parametrize("begin", ["", "Sure!\n", "Here is the translation:", "```\n"])
def test_an_answer_that_repeats_itself_without_end_is_read_all_the_same(begin: str, piece: str) -> None:
    """As small models do. What takes more time than there are characters would never end here."""
    answer = begin + piece * 50_000
    assert len(bare(answer)) <= len(answer)
    assert len(grown(answer)) <= len(answer)


def test_most_answers_are_shown_from_their_first_words_on() -> None:
    assert grown("OPEN") == "OPEN"
    assert grown("The cat") == "The cat"
    assert grown("The text") == grown("好的，以下是") == grown("Sure! Here is the translation:\n\n") == ""
    assert grown("Sure! Here is the translation:\n\n营业") == "营业"


@pytest.mark.parametrize("answer", TALK)
def test_no_talk_is_ever_shown(answer: str) -> None:
    for end in range(len(answer) + 1):
        assert "营业中".startswith(grown(answer[:end], *LABELS)), answer[:end]
