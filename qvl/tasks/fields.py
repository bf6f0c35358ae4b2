"""`extract`: what a picture says, as an object that keeps to a JSON schema.

The schema goes to the server as `response_format`, so that only tokens which keep to it are chosen, and into the
question, so that the model knows what is wanted. Whoever answers, the answer is checked here: a server that does not
know `response_format`, or does not keep to it, is asked in words, and once more with what was wrong.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload

from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks.base import Ask, Kind, Model, Result, Task, asked, cut_notes, fenced
from qvl.tasks.run import one
from qvl.tasks.schema import Schema, read_json
from qvl.types import Completion, Message, Part, TextPart

Language = Literal["en", "zh"]

PROMPTS: dict[Language, str] = {
    "en": "Extract the information from the {what} as JSON that keeps to this JSON schema. Copy texts as they are "
    "written. Answer with the JSON only.\n\n{schema}",
    "zh": "按照下面的JSON Schema从{what}中提取信息，文字照原样抄写，只输出JSON。\n\n{schema}",
}
REPAIR: dict[Language, str] = {
    "en": "That does not keep to the schema: {complaint}. Answer with the corrected JSON only.",
    "zh": "这不符合该Schema：{complaint}。请只输出改正后的JSON。",
}
WHAT: dict[Language, tuple[str, str]] = {"en": ("picture", "text below it"), "zh": ("图片", "其后的文字")}

REFUSED = "the server did not take the schema ({reason}): it was asked in words, and its answer checked here"
REPAIRED = "the first answer did not keep to the schema; it was asked once more"


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
    # Why the server does not take schemas, once it has said so: told once, and not tried again for every picture.
    _refusal: list[str] = field(default_factory=list, init=False, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

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
        try:
            value = read_json(fenced(answer))
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"the answer is not JSON: {error}") from error
        complaint = self.schema.complaint(value)
        if complaint is not None:
            raise BadAnswer(complaint)
        return value

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Any]:
        prompt = self.prompt
        if all(isinstance(part, TextPart) for part in parts):
            prompt = PROMPTS[self.lang].format(what=WHAT[self.lang][1], schema=self.schema.text)
        messages = asked(prompt, parts)
        completion = self._ask(ask, messages)
        notes = [REFUSED.format(reason=self._refusal[0])] if self._refusal else []
        try:
            return self.result(self.read(completion.text), tuple(notes))
        except BadAnswer as error:
            if cut_notes(completion):
                raise BadAnswer("the answer was cut before the JSON was complete: --max-tokens allows more") from error
            value = self._once_more(ask, messages, completion, error)
            return self.result(value, (*notes, REPAIRED))

    def text(self, value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=2)

    def _ask(self, ask: Ask, messages: tuple[Message, ...]) -> Completion:
        """With the schema as a constraint; without, where the server refuses it."""
        if not self._refusal:
            try:
                return ask(messages, dataclasses.replace(self.sampling, constraint=self.schema.constraint))
            except InvalidRequest as error:
                if not _is_about_schema(error):
                    raise
                with self._lock:
                    self._refusal.append(" ".join(error.message.split())[:200])
        return ask(messages, self.sampling)

    def _once_more(self, ask: Ask, messages: tuple[Message, ...], completion: Completion, error: BadAnswer) -> Any:
        said = Message("assistant", (TextPart(completion.text),))
        again = Message("user", (TextPart(REPAIR[self.lang].format(complaint=error.message)),))
        second = self._ask(ask, (*messages, said, again))
        try:
            return self.read(second.text)
        except BadAnswer as still:
            raise BadAnswer(f"the answer does not keep to the schema: {still.message}") from still


def _is_about_schema(error: InvalidRequest) -> bool:
    """Whether a refusal names what we sent for the schema: it says so in its field or in its words."""
    told = f"{error.param or ''} {error.message}".lower()
    return any(word in told for word in ("response_format", "json_schema", "schema", "grammar", "constraint", "guided"))


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
