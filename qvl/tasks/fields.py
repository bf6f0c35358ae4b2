"""`extract`: what a picture says, as an object that keeps to a JSON schema.

The schema goes to the server and into the question, so that the model knows what is wanted; `keeping` sees to it that
the answer keeps to it. Does not know files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload

from qvl.tasks.base import Ask, Kind, Model, Result, Task, asked
from qvl.tasks.keeping import Keeping, Language
from qvl.tasks.run import one
from qvl.tasks.schema import Schema
from qvl.types import Part, TextPart

PROMPTS: dict[Language, str] = {
    "en": "Extract the information from the {what} as JSON that keeps to this JSON schema. Copy texts as they are "
    "written. Answer with the JSON only.\n\n{schema}",
    "zh": "按照下面的JSON Schema从{what}中提取信息，文字照原样抄写，只输出JSON。\n\n{schema}",
}
WHAT: dict[Language, tuple[str, str]] = {"en": ("picture", "text below it"), "zh": ("图片", "其后的文字")}


class Validating(Protocol):
    """A pydantic class, which is both a schema and what an answer becomes."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    @classmethod
    def model_validate(cls, obj: Any) -> Any: ...


M = TypeVar("M", bound=Validating)


@dataclass(frozen=True, kw_only=True)
class Extract(Task[Any]):
    """Always valid: what does not keep to `schema` after a second try is an error."""

    name: ClassVar[str] = "extract"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image", "text"})

    schema: Schema
    lang: Language = "en"
    _keeping: Keeping = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_keeping", Keeping(self.schema, self.lang))

    @property
    def suffix(self) -> str:
        return ".json"

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        return "json"

    @property
    def prompt(self) -> str:
        return PROMPTS[self.lang].format(what=WHAT[self.lang][0], schema=self.schema.text)

    def read(self, answer: str) -> Any:
        return self._keeping.read(answer)

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Any]:
        prompt = self.prompt
        if all(isinstance(part, TextPart) for part in parts):
            prompt = PROMPTS[self.lang].format(what=WHAT[self.lang][1], schema=self.schema.text)
        kept = self._keeping.ask(ask, asked(prompt, parts), self.sampling, has_words=True)
        return self.result(kept.value, kept.notes)

    def text(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=2)


@overload
def extract(source: Any, schema: type[M], *, model: Model | None = ..., page: int | None = ...) -> M: ...
@overload
def extract(
    source: Any, schema: dict[str, Any] | str | Path | Schema, *, model: Model | None = ..., page: int | None = ...
) -> Any: ...
def extract(source: Any, schema: Any, *, model: Model | None = None, page: int | None = None) -> Any:
    """The fields of a picture (`source`, `model` and `page` as for `ocr`) or of a `TextPart`.

    `schema` is a JSON schema: a dict, its text, or a file; or a pydantic class, of which an instance comes back. Raises
    `BadAnswer` rather than return what does not keep to it.
    """
    value = one(Extract(schema=Schema.read(schema)), source, model, page)
    return schema.model_validate(value) if hasattr(schema, "model_validate") else value
