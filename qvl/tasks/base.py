"""What a task is: a documented question, and the checked reading of its answer. Who answers is behind one method.

    Task --question--> asked about a picture --read--> value, with its text and its JSON

Knows neither files nor sockets nor the command line.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

from qvl.errors import BadAnswer
from qvl.types import Completion, Delta, Message, Part, PictureRule, SamplingParams, TextPart

T = TypeVar("T")

Kind: TypeAlias = Literal["image", "video", "text"]
# Makes of an answer that is still coming what the result's text will begin with.
Growing: TypeAlias = Callable[[str], str]

CUT = "the answer was cut at its length (--max-tokens allows more)"


class Ask(Protocol):
    """Answers a conversation, to its end. Raises `QvlError`s."""

    def __call__(
        self, messages: tuple[Message, ...], sampling: SamplingParams, growing: Growing | None = None, /
    ) -> Completion:
        """With `growing`, somebody may be shown the result while the answer comes."""


class Model(Protocol):
    """Who answers: `qvl.Client`, `qvl.LLM`, or anything else with this method."""

    def stream(self, messages: tuple[Message, ...], sampling: SamplingParams, /) -> Iterator[Delta]:
        """The answer as it grows. Raises `QvlError`s."""


@runtime_checkable
class Sighted(Protocol):
    """A `Model` that can say how it sees pictures; pages of a PDF are then drawn at the size that suits it."""

    def picture_rule(self) -> PictureRule | None:
        """None where it is not known."""

    def context(self) -> int | None:
        """The most tokens of a request with its answer; None where it is not known."""


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What came of one picture: `text` is how it is printed, `data` how it stands in JSON, `notes` what to know."""

    value: T
    text: str
    data: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task(ABC, Generic[T]):
    """One kind of work with its options chosen. A subclass adds fields for its options and says what it asks.

    `name` is the command's. `accepts` are the kinds of input it can be asked about. `suffix` ends the names of files
    that hold its `text`. `several` says how the texts of several pictures are kept apart in one stream: by a heading
    each, by an empty line, or not at all: then each is a line of JSON.
    """

    name: ClassVar[str]
    accepts: ClassVar[frozenset[Kind]] = frozenset({"image"})

    max_tokens: int = 2048

    @property
    def suffix(self) -> str:
        return ".txt"

    @property
    def several(self) -> Literal["headings", "blank", "json"]:
        return "headings"

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What is asked about a picture, as docs/tasks.md tells it."""

    @abstractmethod
    def read(self, answer: str) -> T:
        """The value in an answer. Raises `BadAnswer` for one that is not what was asked for."""

    def text(self, value: T) -> str:
        return str(value)

    def growing(self, answer: str) -> str:
        """What `text` will begin with, by an answer that is still coming; empty where only a whole one tells."""
        return ""

    def data(self, value: T) -> Any:
        return value

    @property
    def sampling(self) -> SamplingParams:
        """Greedy: the same picture gives the same answer."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=0.0)

    def answer(self, ask: Ask, parts: Sequence[Part]) -> Result[T]:
        """The result for one input: here one question and one reading; a task of several questions overrides it."""
        completion = ask(asked(self.prompt, parts), self.sampling, self.growing)
        return self.result(self.read(completion.text), cut_notes(completion))

    def result(self, value: T, notes: tuple[str, ...] = ()) -> Result[T]:
        return Result(value, self.text(value), self.data(value), notes)

    def for_model(self, model: Model) -> Task[T]:
        """The task as it suits the model that will answer; one that depends on what a model tells overrides it."""
        return self

    def with_max_tokens(self, max_tokens: int | None) -> Task[T]:
        return self if max_tokens is None else dataclasses.replace(self, max_tokens=max_tokens)


def asked(prompt: str, parts: Sequence[Part], *, system: str | None = None) -> tuple[Message, ...]:
    """The conversation of one question: pictures first, then the prompt; a text to work on stands below the prompt."""
    media = tuple(part for part in parts if not isinstance(part, TextPart))
    given = [part.text for part in parts if isinstance(part, TextPart)]
    opening = (Message("system", (TextPart(system),)),) if system is not None else ()
    return (*opening, Message("user", (*media, TextPart("\n\n".join([prompt, *given])))))


def said(answer: str) -> str:
    """The answer without blanks around it. Raises `BadAnswer` for an empty one."""
    if not answer.strip():
        raise BadAnswer("the model gave an empty answer")
    return answer.strip()


def cut_notes(completion: Completion) -> tuple[str, ...]:
    """The note that an answer is not whole, where it is not."""
    return (CUT,) if completion.answers[0].finish_reason == "length" else ()
