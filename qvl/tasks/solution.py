"""`solve`: a problem of mathematics, step by step, with the final answer apart from the steps.

Knows the questions and where models put their final answer. Does not know mathematics.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qvl.tasks.base import Ask, Kind, Model, Result, Task, asked, cut_notes, said
from qvl.tasks.run import one
from qvl.tasks.wrappings import certain
from qvl.types import Part, TextPart

Language = Literal["en", "zh"]

# The words that Qwen's models of mathematics are trained and measured with.
PROMPTS: dict[Language, str] = {
    "en": "Solve the problem in the picture. Please reason step by step, and put your final answer within \\boxed{}.",
    "zh": "解答图中的题目。请逐步推理，并把最终答案放在\\boxed{}中。",
}
TEXT_PROMPTS: dict[Language, str] = {
    "en": "Solve the problem below. Please reason step by step, and put your final answer within \\boxed{}.",
    "zh": "解答下面的题目。请逐步推理，并把最终答案放在\\boxed{}中。",
}
NO_ANSWER = "no final answer was found: the steps are all there is"

_SO = r"(?:(?:so|thus|hence|therefore|所以|因此|因而|故)[,，]?\s*)?"
_NAME = r"(?:(?:the\s+)?(?:final\s+|correct\s+)?(?:answer|option|choice)|(?:最终|正确)?(?:答案|选项))"
_MARK = r"(?:[*_\s]*(?:is|是|为)\s*[:：]?|[*_\s]*[:：]|\s*[*_]*\n+)"  # between the name and what it announces
_CHOSEN = r"[故应]?该?选(?:择|项)?\s*(?:是|为)?\s*[:：]?\s*(?=[(（]?[A-H](?:$|[^A-Za-z]))"  # then a letter
_SAID = re.compile(rf"^[^\w\n]*{_SO}(?:{_NAME}{_MARK}\s*|{_CHOSEN})(\S.*?)\s*$", re.I | re.M)
_BRACE = re.compile(r"(?P<boxed>\\f?box(?:ed)?\s*\{)|(?<!\\)[{}]")
# Around an answer: bold print, a full stop, the marks of mathematics.
_EDGES = re.compile(r"^(?:[*_\s$]|\\[(\[])+|(?:[*_\s$.。．]|\\[)\]])+$")


@dataclass(frozen=True, slots=True)
class Solution:
    """`steps` is all that was said; `answer` the final answer alone (may be LaTeX), None where none was marked."""

    steps: str
    answer: str | None

    def __str__(self) -> str:
        return self.steps


@dataclass(frozen=True, kw_only=True)
class Solve(Task[Solution]):
    """`answer_only` prints the final answer alone."""

    name: ClassVar[str] = "solve"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image", "text"})

    max_tokens: int = 4096
    lang: Language = "en"
    answer_only: bool = False

    @property
    def prompt(self) -> str:
        return PROMPTS[self.lang]

    def read(self, answer: str) -> Solution:
        return Solution(said(answer), final_answer(answer))

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Solution]:
        is_text = all(isinstance(part, TextPart) for part in parts)
        prompt = TEXT_PROMPTS[self.lang] if is_text else self.prompt
        completion = ask(asked(prompt, parts), self.sampling, self.growing)
        solution = self.read(completion.text)
        missing = (NO_ANSWER,) if solution.answer is None else ()
        return self.result(solution, (*missing, *cut_notes(completion)))

    def text(self, value: Solution) -> str:
        return value.steps if value.answer is None or not self.answer_only else value.answer

    def growing(self, answer: str) -> str:
        return "" if self.answer_only else certain(answer).lstrip()

    def data(self, value: Solution) -> Any:
        return {"answer": value.answer, "steps": value.steps}


def final_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{...} (or \fbox), else behind the last "Answer:"."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    announced = _SAID.findall(text)
    return _EDGES.sub("", announced[-1]) or None if announced else None


def _last_boxed(text: str) -> str | None:
    """Braces may nest; one that never closes (the answer was cut) does not count."""
    open_: list[int | None] = []  # where what stands in a box begins, None for other braces
    last: tuple[int, int] | None = None
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_.append(brace.end() if brace["boxed"] else None)
        elif open_ and (start := open_.pop()) is not None and (last is None or start > last[0]):
            last = start, brace.start()
    return text[last[0] : last[1]] if last else None


def solve(source: Any, *, lang: Language = "en", model: Model | None = None, page: int | None = None) -> Solution:
    """The solution of a problem in a picture (`source`, `model` and `page` as for `ocr`) or of a `TextPart`."""
    return one(Solve(lang=lang), source, model, page)
