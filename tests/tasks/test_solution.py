"""solve: the final answer apart from the steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvl.errors import BadAnswer
from qvl.tasks import Solution, Solve, each, solve
from qvl.tasks.solution import NO_ANSWER, final_answer
from qvl.types import TextPart
from tests.tasks.scripted import Scripted


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"2 + 2 = 4, so \boxed{4}.", "4"),
        (r"First \boxed{1}, then \boxed{\frac{a}{b}}", r"\frac{a}{b}"),
        (r"$$\boxed { x = 3 }$$", "x = 3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} and \boxed{cut", "7"),
        (r"\boxed{}", None),
        ("So.\nThe final answer is: 42.", "42"),
        ("**Answer:** $x = 5$", "x = 5"),
        ("Answer: 1\nNo, wait.\nAnswer: 2", "2"),
        ("答案：12", "12"),
        ("最终答案是 3/4", "3/4"),
        ("So x = 7.\n\nTherefore, the answer is 7.", "7"),
        ("**Final Answer**: $x = 3$", "x = 3"),
        ("**Final Answer**\n\n$42$", "42"),
        ("### Answer\n42.", "42"),
        ("the correct answer is (C) 5", "(C) 5"),
        ("So the correct option is B.", "B"),
        ("The answer is **12**.", "12"),
        ("所以答案是7。", "7"),
        ("因此，答案为 $x=2$。", "x=2"),
        ("故选：B", "B"),
        ("解得三角形为直角三角形。\n故选B。", "B"),
        ("故选：C．", "C"),
        ("应选 D", "D"),
        ("因此，该选择（A）。", "（A）"),
        ("综上，\n选B", "B"),
        ("选取点P作垂线。", None),
        ("选择题第一题。", None),
        (r"$\fbox{3}$", "3"),
        (r"So the answer is \(x=2\).", "x=2"),
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"Answer: \[ \sqrt{2} \]", r"\sqrt{2}"),
        ("The answer follows from the second line.", None),
        ("I do not know.", None),
        ("The answers differ.", None),
        ("", None),
    ],
)
def test_the_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_picture_and_a_text(samples: Path) -> None:
    model = Scripted(["2 + 2 = 4\n\\boxed{4}\n"])
    assert solve(samples / "open.png", model=model) == Solution("2 + 2 = 4\n\\boxed{4}", "4")
    assert solve(TextPart("What is 2 + 2?"), model=model, lang="zh").answer == "4"
    picture, text = model.prompts()
    assert picture.startswith("Solve the problem in the picture.") and "\\boxed{}" in picture
    assert text.startswith("解答下面的题目") and text.endswith("What is 2 + 2?")


@pytest.mark.parametrize("only, text", [(False, "It is\n\\boxed{4}"), (True, "4")])
def test_what_is_printed(only: bool, text: str, samples: Path) -> None:
    [outcome] = each(Solve(answer_only=only), samples / "open.png", model=Scripted(["It is\n\\boxed{4}"]))
    assert outcome.result is not None
    assert outcome.result.text == text
    assert outcome.result.data == {"answer": "4", "steps": "It is\n\\boxed{4}"}


def test_an_empty_answer_is_an_error(samples: Path) -> None:
    with pytest.raises(BadAnswer, match="empty answer"):
        solve(samples / "open.png", model=Scripted([" "]))


def test_a_missing_answer_is_told(samples: Path) -> None:
    [outcome] = each(Solve(answer_only=True), samples / "open.png", model=Scripted(["Hm."]))
    assert outcome.result is not None
    assert (outcome.result.text, outcome.result.notes) == ("Hm.", (NO_ANSWER,))
