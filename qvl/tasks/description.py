"""`describe`: what a picture or a video shows, as short or as long as is wanted, in any language.

Knows the questions. Does not know files or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qvl.tasks.base import Kind, Model, Task
from qvl.tasks.language import language
from qvl.tasks.run import one

Length = Literal["short", "medium", "long"]

# "Describe this image." and its Chinese form stand in the checkpoints' own training as they are.
PROMPTS: dict[Length, str] = {
    "short": "Describe this image in one sentence.",
    "medium": "Describe this image.",
    "long": "Describe this image in detail.",
}
PROMPTS_ZH: dict[Length, str] = {
    "short": "用一句话描述这张图片",
    "medium": "描述这张图片",
    "long": "详细描述这张图片",
}
MAX_TOKENS: dict[Length, int] = {"short": 128, "medium": 512, "long": 2048}


@dataclass(frozen=True, kw_only=True)
class Describe(Task[str]):
    """Prose. `lang` is the language of the answer: a code such as "en" or "zh", or a name such as "French"."""

    name: ClassVar[str] = "describe"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image", "video"})

    length: Length = "medium"
    lang: str = "en"

    @property
    def prompt(self) -> str:
        wanted = language(self.lang)
        if wanted.code == "zh":
            return PROMPTS_ZH[self.length]
        asked = PROMPTS[self.length]
        return asked if wanted.code == "en" else f"{asked} Answer in {wanted.name}."

    def read(self, answer: str) -> str:
        return answer.strip()


def describe(
    source: Any, *, length: Length = "medium", lang: str = "en", model: Model | None = None, page: int | None = None
) -> str:
    """What a picture shows. `source`, `model` and `page` as for `ocr`; also a video's path, address or `MediaPart`."""
    return one(Describe(length=length, lang=lang, max_tokens=MAX_TOKENS[length]), source, model, page)
