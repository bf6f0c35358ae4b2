"""`watch`: what happens in a video. A short clip is asked about at once, a long one in parts, with a summary over them.

Knows the questions, and what to do when a part does not fit after all. `film` says which frames go where. Does not know
files or the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from qvl.errors import InvalidRequest, PayloadTooLarge, PromptTooLong, QvlError
from qvl.tasks.base import Ask, Growing, Kind, Model, Result, Sighted, Task, asked, cut_notes, said
from qvl.tasks.film import Film, Shot, Stretch, plan
from qvl.tasks.run import one
from qvl.tasks.wrappings import certain
from qvl.types import MediaPart, Message, Part, SamplingParams, TextPart

QUESTION = "Describe the video."
SUMMARY = """These are notes about the parts of one video, in order.

{notes}

From these notes alone, answer for the whole video, briefly and without naming the parts: {question}"""
UNTOLD_CONTEXT = 8192  # tokens; what to keep to with a model that does not say
_TEMPLATE_TOKENS = 64  # what a conversation has around its question and its pictures

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Seen:
    """What was answered about a part of a video, in seconds."""

    begin: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Watched:
    """The answer about a whole video, and about its parts. Empty where a summary of several was not wanted."""

    answer: str
    parts: tuple[Seen, ...]


@dataclass(frozen=True, kw_only=True)
class Watch(Task[Watched]):
    """An answer to `question`, from `fps` frames of every second between `begin` and `end` (seconds).

    `context` is the most tokens that a question to the model may have; `tell` hears how far the work is.
    """

    name: ClassVar[str] = "watch"
    accepts: ClassVar[frozenset[Kind]] = frozenset({"video"})

    question: str = QUESTION
    fps: float = 2.0
    begin: float = 0.0
    end: float | None = None
    summary: bool = True
    context: int | None = None
    tell: Tell | None = field(default=None, compare=False)
    max_tokens: int = 512

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise InvalidRequest("the question is empty", param="question")
        if not 0 < self.fps <= 60:
            raise InvalidRequest("fps must be above 0 and at most 60", param="fps")
        if self.begin < 0 or (self.end is not None and self.end <= self.begin):
            raise InvalidRequest("the end must lie behind the beginning", param="to")

    @property
    def prompt(self) -> str:
        return self.question.strip()

    def for_model(self, model: Model) -> Watch:
        """With the model's context."""
        return dataclasses.replace(self, context=model.context() if isinstance(model, Sighted) else None)

    @property
    def sampling(self) -> SamplingParams:
        """An answer may take a quarter of the context at most: the frames need the rest."""
        longest = max(1, (self.context or UNTOLD_CONTEXT) // 4)
        return dataclasses.replace(super().sampling, max_tokens=min(self.max_tokens, longest))

    @property
    def room(self) -> int:
        """Tokens for the frames of one question."""
        text = len(self.prompt.encode()) + _TEMPLATE_TOKENS  # no tokenizer makes more tokens than there are bytes
        return (self.context or UNTOLD_CONTEXT) - (self.sampling.max_tokens or 0) - text

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[Watched]:
        part = next(part for part in parts if isinstance(part, MediaPart))
        notes: list[str] = []
        with Film(part) as film:
            stretches = plan(film.facts, fps=self.fps, begin=self.begin, end=self.end, room=self.room)
            seen = self._watch(ask, film, stretches, notes)
        if len(seen) == 1:
            return self.result(Watched(seen[0].text, tuple(seen)), tuple(dict.fromkeys(notes)))
        answer = ""
        if self.summary:
            try:
                answer = self._summary(ask, seen, notes, functools.partial(_grown, f"{_listed(seen)}\n\n"))
            except QvlError as error:
                notes.append(f"there is no summary: {error.message}")
        return self.result(Watched(answer, tuple(seen)), tuple(dict.fromkeys(notes)))

    def _watch(self, ask: Ask, film: Film, stretches: Sequence[Stretch], notes: list[str]) -> list[Seen]:
        """All parts, in order. When one fails, what was seen before it is kept and the rest is left."""
        seen: list[Seen] = []
        try:
            for number, shot in enumerate(film.shots(stretches), start=1):
                if self.tell is not None and len(stretches) > 1:
                    self.tell(f"part {number} of {len(stretches)}: {shot.stretch.title}")
                self._look(ask, shot, seen, notes, alone=len(stretches) == 1)
        except QvlError as error:
            if not seen:
                raise
            notes.append(
                f"only watched until {Stretch(0, seen[-1].end, (), 0).title.partition('-')[2]}: {error.message}"
            )
        return seen

    def _look(self, ask: Ask, shot: Shot, seen: list[Seen], notes: list[str], *, alone: bool) -> None:
        """Add what is seen of a part, of its two halves where it is too long for the model after all."""
        before = "" if alone else f"{_listed(seen)}\n[{shot.stretch.title}] ".lstrip("\n")
        try:
            completion = ask(asked(self.prompt, (shot.part,)), self.sampling, functools.partial(_grown, before))
        except QvlError as error:
            if not (_is_too_long(error) and shot.can_be_halved):
                raise
            for half in shot.halves():
                self._look(ask, half, seen, notes, alone=False)
            return
        notes += cut_notes(completion)
        seen.append(Seen(shot.stretch.begin, shot.stretch.end, said(completion.text)))

    def _summary(self, ask: Ask, seen: Sequence[Seen], notes: list[str], growing: Growing | None = None) -> str:
        """One answer over all parts; where they are too many for the model, over summaries of their halves."""
        text = SUMMARY.format(notes=_listed(seen), question=self.prompt)
        try:
            completion = ask((Message("user", (TextPart(text),)),), self.sampling, growing)
        except QvlError as error:
            if not (_is_too_long(error) and len(seen) > 2):
                raise
            middle = len(seen) // 2
            halves = [seen[:middle], seen[middle:]]
            told = [Seen(half[0].begin, half[-1].end, self._summary(ask, half, notes)) for half in halves]
            return self._summary(ask, told, notes, growing)
        notes += cut_notes(completion)
        return said(completion.text)

    def read(self, answer: str) -> Watched:
        """An answer about a whole clip."""
        return Watched(said(answer), ())

    def text(self, value: Watched) -> str:
        if len(value.parts) < 2:
            return value.answer
        listed = _listed(value.parts)
        return f"{listed}\n\n{value.answer}" if value.answer else listed

    def data(self, value: Watched) -> dict[str, Any]:
        parts = [{"from": round(seen.begin, 3), "to": round(seen.end, 3), "answer": seen.text} for seen in value.parts]
        return {"answer": value.answer or None, "parts": parts}


def _listed(seen: Sequence[Seen]) -> str:
    """The parts as they are printed, and as they are told to the model that sums them up."""
    return "\n".join(f"[{Stretch(part.begin, part.end, (), 0).title}] {part.text}" for part in seen)


def _grown(before: str, answer: str) -> str:
    return before + certain(answer).lstrip()


def _is_too_long(error: QvlError) -> bool:
    """Whether a server refused a question for its length; others than qvl's say it in words."""
    too_long = r"(?i)maximum (?:context|model) length|context (?:length|window)|too many tokens|longer than the maximum"
    return isinstance(error, PromptTooLong | PayloadTooLarge) or (
        isinstance(error, InvalidRequest) and re.search(too_long, error.message) is not None
    )


def watch(
    source: Any,
    question: str = QUESTION,
    *,
    fps: float = 2.0,
    begin: float = 0.0,
    end: float | None = None,
    model: Model | None = None,
) -> Watched:
    """What happens in a video: a path, an address or the bytes of a file, between `begin` and `end` (seconds).

    `model` is a `qvl.Client` or a `qvl.LLM`; None asks the server on this machine, else the bundled checkpoint.
    """
    return one(Watch(question=question, fps=fps, begin=begin, end=end), source, model, None)
