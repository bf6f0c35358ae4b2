"""An answer that keeps to a JSON schema, whoever gives it.

The schema goes along as `response_format`, so that only tokens which keep to it are chosen; the answer is checked here
all the same. A server that does not know `response_format`, or does not keep to it, is asked in words, and once more
with what was wrong. Knows conversations; does not know pictures or tasks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from qvl.errors import BadAnswer, InvalidRequest
from qvl.tasks.base import Ask, cut_notes
from qvl.tasks.loose_json import values
from qvl.tasks.schema import Schema
from qvl.tasks.wrappings import fences
from qvl.types import Completion, Message, SamplingParams, TextPart

Language = Literal["en", "zh"]

WORDS: dict[Language, str] = {
    "en": "Answer only with JSON that keeps to this JSON schema: {schema}",
    "zh": "只输出符合以下JSON Schema的JSON：{schema}",
}
REPAIR: dict[Language, str] = {
    "en": "That does not keep to the schema: {complaint}. Answer with the corrected JSON only.",
    "zh": "这不符合该Schema：{complaint}。请只输出改正后的JSON。",
}
REFUSED = "the server did not take the schema ({reason}): it was asked in words, and its answer checked here"
MENDED = "the answer was not JSON to the letter (quotes, commas); it was read as it was meant"
REPAIRED = "the first answer did not keep to the schema; it was asked once more"
_TOLD = 200  # characters of a refusal


@dataclass(frozen=True, slots=True)
class Kept:
    """A value that keeps to the schema, the answer that it was read from, and what there is to know about it."""

    value: Any
    completion: Completion
    notes: tuple[str, ...]


class Keeping:
    """Asks for what keeps to one schema. Remembers that a server does not take schemas; safe to use from threads."""

    def __init__(self, schema: Schema, lang: Language = "en") -> None:
        self._schema = schema
        self._lang: Language = lang
        self._refusal: str | None = None

    def ask(
        self, ask: Ask, messages: tuple[Message, ...], sampling: SamplingParams, *, has_words: bool = False
    ) -> Kept:
        """`has_words`: the messages tell the schema already. Raises `BadAnswer` for what does not keep to it twice."""
        completion, messages = self._first(ask, messages, sampling, has_words)
        notes = () if self._refusal is None else (REFUSED.format(reason=self._refusal),)
        try:
            value, remarks = self._read(completion.text)
            return Kept(value, completion, (*notes, *remarks))
        except BadAnswer as error:
            if cut_notes(completion):
                raise BadAnswer("the answer was cut before the JSON was complete: --max-tokens allows more") from error
            if not has_words and self._refusal is None:
                messages = self._in_words(messages)  # a server that ignored the schema has not seen it yet
            said = Message("assistant", (TextPart(completion.text),))
            again = Message("user", (TextPart(REPAIR[self._lang].format(complaint=error.message)),))
            second = ask((*messages, said, again), self._sampling(sampling))
        try:
            value, remarks = self._read(second.text)
            return Kept(value, second, (*notes, *remarks, REPAIRED))
        except BadAnswer as still:
            raise BadAnswer(f"the answer does not keep to the schema: {still.message}") from still

    def read(self, answer: str) -> Any:
        """The value in an answer. Raises `BadAnswer` for one that does not keep to the schema."""
        return self._read(answer)[0]

    def _read(self, answer: str) -> tuple[Any, tuple[str, ...]]:
        """The first value that keeps to the schema, in a code fence or outside, and what there is to know about it."""
        complaints: list[str] = []
        for text in (*fences(answer), answer):
            try:
                for value, exact in values(text):
                    complaint = self._schema.complaint(value)
                    if complaint is None:
                        return value, () if exact else (MENDED,)
                    complaints.append(complaint)
            except ValueError as error:
                complaints.append(f"the answer is not JSON: {error}")
        raise BadAnswer(complaints[0] if complaints else "there is no JSON in the answer")

    def _first(
        self, ask: Ask, messages: tuple[Message, ...], sampling: SamplingParams, has_words: bool
    ) -> tuple[Completion, tuple[Message, ...]]:
        """The first answer, and the messages that it answers: with the schema told in words where it is refused."""
        if self._refusal is None:
            try:
                return ask(messages, self._sampling(sampling)), messages
            except InvalidRequest as error:
                if not _is_about_schema(error):
                    raise
                self._refusal = " ".join(error.message.split())[:_TOLD]
        worded = messages if has_words else self._in_words(messages)
        return ask(worded, sampling), worded

    def _sampling(self, sampling: SamplingParams) -> SamplingParams:
        return sampling if self._refusal else dataclasses.replace(sampling, constraint=self._schema.constraint)

    def _in_words(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """The conversation with the schema below what the user said last."""
        *before, last = messages
        words = TextPart(f"\n\n{WORDS[self._lang].format(schema=self._schema.text)}")
        return (*before, Message(last.role, (*last.parts, words)))


def _is_about_schema(error: InvalidRequest) -> bool:
    """Whether a refusal names what we sent for the schema: it says so in its field or in its words."""
    told = f"{error.param or ''} {error.message}".lower()
    return any(word in told for word in ("response_format", "json_schema", "schema", "grammar", "constraint", "guided"))
