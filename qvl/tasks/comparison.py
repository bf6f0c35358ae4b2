"""`compare`: what differs between two pictures, in words or as a list, with what the pixels say.

Knows the questions. Two pictures that are the same to the last pixel are not asked about. Does not know files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from qvl.errors import QvlError
from qvl.tasks.base import Ask, Model, Result, Task, asked, cut_notes, said
from qvl.tasks.differences import SAME, Difference, difference
from qvl.tasks.fields import Extract
from qvl.tasks.inputs import Reading, one_part
from qvl.tasks.pictures import Pixels, pixels_of
from qvl.tasks.run import asking, default_model, resolution_for
from qvl.tasks.schema import Schema
from qvl.tasks.wrappings import certain
from qvl.types import MediaPart, Part

Language = Literal["en", "zh"]

PROMPTS: dict[Language, str] = {
    "en": "Compare these two pictures. What differs between the first and the second? Name each difference and where "
    "it is. Leave out what is the same.",
    "zh": "比较这两张图片，第二张与第一张有哪些不同？逐条说明不同之处及其位置，相同的部分不必写。",
}
LIST_PROMPTS: dict[Language, str] = {
    "en": "Compare these two pictures. List each difference between the first and the second as JSON that keeps to "
    "this JSON schema. Leave out what is the same. Answer with the JSON only.\n\n{schema}",
    "zh": "比较这两张图片，按照下面的JSON Schema逐条列出第二张与第一张的不同之处，相同的部分不必写，只输出JSON。"
    "\n\n{schema}",
}
MOST_LISTED = 30
_TEXT = {"type": "string", "maxLength": 300}
SCHEMA = Schema(
    {
        "type": "object",
        "properties": {
            "differences": {
                "type": "array",
                "maxItems": MOST_LISTED,
                "items": {
                    "type": "object",
                    "properties": {"what": _TEXT, "where": _TEXT, "first": _TEXT, "second": _TEXT},
                    "required": ["what", "where", "first", "second"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["differences"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`text` in words, or `differences` as objects with what, where, first and second; `pixels` tells where the two
    differ, whatever a model saw."""

    text: str = ""
    differences: tuple[Mapping[str, str], ...] = ()
    pixels: Difference = SAME


@dataclass(frozen=True, kw_only=True)
class Listing(Extract):
    """The question for a list."""

    name: ClassVar[str] = "compare"

    schema: Schema = SCHEMA

    @property
    def prompt(self) -> str:
        return LIST_PROMPTS[self.lang].format(schema=self.schema.text)


@dataclass(frozen=True, kw_only=True)
class Compare(Task[Comparison]):
    """What differs between two pictures, in words or `listed`."""

    name: ClassVar[str] = "compare"

    listed: bool = False
    lang: Language = "en"

    @property
    def prompt(self) -> str:
        return PROMPTS[self.lang]

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Comparison]:
        pictures = [part for part in parts if isinstance(part, MediaPart)]
        first, second = (_pixels(part, which) for part, which in zip(pictures, ("first", "second"), strict=True))
        pixels = difference(first, second)
        if pixels.identical:
            return self.result(Comparison(pixels.told(), pixels=pixels))
        if self.listed:
            result = Listing(lang=self.lang, max_tokens=self.max_tokens).answer(ask, parts)
            value = Comparison(differences=tuple(result.value["differences"]), pixels=pixels)
            return self.result(value, (*result.notes, pixels.told()))
        completion = ask(asked(self.prompt, parts), self.sampling, self.growing)
        value = replace(self.read(completion.text), pixels=pixels)
        return self.result(value, (*cut_notes(completion), pixels.told()))

    def read(self, answer: str) -> Comparison:
        return Comparison(said(answer))

    def text(self, value: Comparison) -> str:
        if not value.differences:
            return value.text or "no difference was named"
        return "\n".join(
            f"- {item['what']} ({item['where']}): {item['first']} -> {item['second']}" for item in value.differences
        )

    def growing(self, answer: str) -> str:
        return certain(answer).lstrip()

    def data(self, value: Comparison) -> dict[str, Any]:
        told = {"differences": list(value.differences)} if self.listed else {"answer": value.text}
        return {
            "identical": value.pixels.identical,
            **told,
            "changed_pixels": round(value.pixels.changed, 6),
            "regions": [list(box) for box in value.pixels.regions],
        }


def _pixels(part: MediaPart, which: str) -> Pixels:
    try:
        return pixels_of(part)
    except QvlError as error:
        raise error.about(f"the {which} picture") from None


def compare(
    first: Any, second: Any, *, listed: bool = False, lang: Language = "en", model: Model | None = None
) -> Comparison:
    """What differs between two pictures: paths, addresses, bytes, PIL pictures or arrays.

    In words, or `listed`. `model` is a `qvl.Client` or a `qvl.LLM`; None asks the server on this machine, else the
    bundled checkpoint, which cannot do this.
    """
    model = model or default_model()
    reading = Reading(resolution=lambda: resolution_for(model))
    parts = (one_part(first, reading), one_part(second, reading))
    result = Compare(listed=listed, lang=lang).answer(asking(model), parts)
    return result.value
