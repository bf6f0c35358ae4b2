"""`translate`: the text in a picture, or a text, in another language.

Knows the questions, and that a long text is translated in parts. Does not know files or models.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from qvl.errors import InvalidRequest
from qvl.tasks.base import Ask, Kind, Model, Result, Task, asked, cut_notes, said
from qvl.tasks.language import language
from qvl.tasks.run import one
from qvl.tasks.wrappings import bare, certain, grown
from qvl.types import Part, TextPart

LABELS = ("translation", "translated text", "译文", "翻译")  # that some models put before one
_FENCES = ("```", "~~~")  # around an answer they are the model's own, but for a text that had one itself
PART_CHARS = 3000  # of a text in one question: its translation fits into an answer of the usual length


@dataclass(frozen=True, kw_only=True)
class Translate(Task[str]):
    """The translation alone. `to` is a language's code ("zh", "en") or name ("French")."""

    name: ClassVar[str] = "translate"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image", "text"})

    to: str = "en"

    def __post_init__(self) -> None:
        language(self.to)  # a mistake is told before anything is asked

    @property
    def prompt(self) -> str:
        return f"Translate the text in the picture into {language(self.to).name}. Answer with the translation only."

    @property
    def text_prompt(self) -> str:
        """What is asked about a text; it stands below."""
        return (
            f"Translate the text below into {language(self.to).name}. Keep its line breaks and formatting. "
            "Answer with the translation only."
        )

    def read(self, answer: str) -> str:
        return said(bare(answer, *LABELS))

    def growing(self, answer: str) -> str:
        return grown(answer, *LABELS).strip()

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[str]:
        if not all(isinstance(part, TextPart) for part in parts):
            return super().answer(ask, parts)
        translated: list[str] = []
        notes: list[str] = []
        whole = "\n\n".join(part.text for part in parts if isinstance(part, TextPart))
        if not whole.strip():
            raise InvalidRequest("there is no text to translate")
        for text, gap in split(whole):
            growing = functools.partial(self._grown, "".join(translated), text)
            completion = ask(asked(self.text_prompt, [TextPart(text)]), self.sampling, growing)
            has_fence = text.lstrip().startswith(_FENCES)
            translated += [said(completion.text) if has_fence else self.read(completion.text), gap]
            notes += [note for note in cut_notes(completion) if note not in notes]
        return self.result("".join(translated), tuple(notes))

    def _grown(self, before: str, text: str, answer: str) -> str:
        return before + (certain(answer).lstrip() if text.lstrip().startswith(_FENCES) else self.growing(answer))


def split(text: str, size: int = PART_CHARS) -> list[tuple[str, str]]:
    """Parts of at most `size` characters, each with the blanks after it. Cut between paragraphs where that goes, else
    between lines, sentences or words, else anywhere."""
    parts: list[tuple[str, str]] = []
    rest = text.strip()
    while len(rest) > size:
        end = _cut(rest, size)
        part, left = rest[:end].rstrip(), rest[end:].lstrip()
        parts.append((part, rest[len(part) : len(rest) - len(left)]))
        rest = left
    return [*parts, (rest, "")]


def _cut(text: str, size: int) -> int:
    for mark in (r"\n\s*\n", r"\n", r"(?<=[.!?。！？])\s*", r"\s"):
        ends = [match.end() for match in re.finditer(mark, text[:size]) if match.end() > size // 4]
        if ends:
            return ends[-1]
    return size


def translate(source: Any, to: str = "en", *, model: Model | None = None, page: int | None = None) -> str:
    """The text in a picture (`source`, `model` and `page` as for `ocr`) or of a `TextPart`, in the language `to`."""
    return one(Translate(to=to), source, model, page)
