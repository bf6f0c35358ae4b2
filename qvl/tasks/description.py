"""`describe`: what a picture or a video shows, as short or as long as is wanted, in any language.

Knows the questions. Does not know files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from qvl.tasks.base import Ask, Kind, Model, Result, Task, asked, cut_notes, said
from qvl.tasks.language import language
from qvl.tasks.run import one
from qvl.tasks.wrappings import certain
from qvl.types import MediaKind, MediaPart, Part

Length = Literal["short", "medium", "long"]

# "Describe this image." and its Chinese form stand in the checkpoints' own training as they are.
PROMPTS: dict[Length, str] = {
    "short": "Describe this {kind} in one sentence.",
    "medium": "Describe this {kind}.",
    "long": "Describe this {kind} in detail.",
}
PROMPTS_ZH: dict[Length, str] = {
    "short": "用一句话描述{kind}",
    "medium": "描述{kind}",
    "long": "详细描述{kind}",
}
KINDS_ZH: dict[MediaKind, str] = {"image": "这张图片", "video": "这个视频"}
MAX_TOKENS: dict[Length, int] = {"short": 128, "medium": 512, "long": 2048}


@dataclass(frozen=True, kw_only=True)
class Describe(Task[str]):
    """Prose. `lang` is the language of the answer: a code such as "en" or "zh", or a name such as "French"."""

    name: ClassVar[str] = "describe"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image", "video"})

    max_tokens: int = MAX_TOKENS["medium"]
    length: Length = "medium"
    lang: str = "en"

    def __post_init__(self) -> None:
        language(self.lang)  # a mistake is told before anything is asked

    @property
    def prompt(self) -> str:
        return self._prompt("image")

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[str]:
        is_video = any(isinstance(part, MediaPart) and part.kind == "video" for part in parts)
        completion = ask(asked(self._prompt("video" if is_video else "image"), parts), self.sampling, self.growing)
        return self.result(self.read(completion.text), cut_notes(completion))

    def _prompt(self, kind: MediaKind) -> str:
        wanted = language(self.lang)
        if wanted.code == "zh":
            return PROMPTS_ZH[self.length].format(kind=KINDS_ZH[kind])
        asked_for = PROMPTS[self.length].format(kind=kind)
        return asked_for if wanted.code == "en" else f"{asked_for} Answer in {wanted.name}."

    def read(self, answer: str) -> str:
        return said(answer)

    def growing(self, answer: str) -> str:
        return certain(answer).lstrip()


def describe(
    source: Any, *, length: Length = "medium", lang: str = "en", model: Model | None = None, page: int | None = None
) -> str:
    """What a picture shows. `source`, `model` and `page` as for `ocr`; also a video's path, address or `MediaPart`."""
    return one(Describe(length=length, lang=lang, max_tokens=MAX_TOKENS[length]), source, model, page)
