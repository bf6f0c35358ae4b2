"""`ocr`: the text in a picture.

Knows the question in both languages and what an answer may carry besides the text. Does not know files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qvl.tasks.base import Model, Task
from qvl.tasks.run import one
from qvl.tasks.wrappings import bare, grown

Language = Literal["en", "zh"]

# Words of the checkpoints' own training: Qwen2-VL and the bundled checkpoint both know them as they stand.
PROMPTS: dict[Language, str] = {"en": "Read all the text in the picture.", "zh": "读出图中的文字。"}


@dataclass(frozen=True, kw_only=True)
class Ocr(Task[str]):
    """Lines as they stand in the picture, from top to bottom. `lang` is the language that is asked in."""

    name: ClassVar[str] = "ocr"

    lang: Language = "en"

    @property
    def prompt(self) -> str:
        return PROMPTS[self.lang]

    def read(self, answer: str) -> str:
        return "\n".join(line.rstrip() for line in bare(answer).strip("\n").splitlines())

    def growing(self, answer: str) -> str:
        return self.read(grown(answer))


def ocr(source: Any, *, lang: Language = "en", model: Model | None = None, page: int | None = None) -> str:
    """The text in a picture: a path, an address, bytes, a PIL picture, an array, or a `page` of a PDF.

    `model` is a `qvl.Client` or a `qvl.LLM`; None asks the server on this machine, else the bundled checkpoint.
    """
    return one(Ocr(lang=lang), source, model, page)
