"""A model and a counter by arithmetic, for rules that need no real one: every request is remembered and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qvl.memory.steps import Messages
from qvl.types import Answer, Completion, MediaPart, Message, Part, SamplingParams, TextPart, Usage

PICTURE_TOKENS = 40


def text_of(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


def media_of(messages: Sequence[Message]) -> list[object]:
    return [part.source for message in messages for part in message.parts if isinstance(part, MediaPart)]


def user(*parts: Part | str) -> Message:
    return Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


def said(text: str, role: str = "assistant") -> Message:
    return Message(role, (TextPart(text),))  # type: ignore[arg-type]


def picture(name: str) -> MediaPart:
    return MediaPart("image", name)


def words_counted(messages: Messages) -> int:
    """Four tokens a message, one a word, 40 a picture, three for the opening of the answer."""
    tokens = 3
    for message in messages:
        tokens += 4 + len(text_of(message).split()) + PICTURE_TOKENS * len(media_of([message]))
    return tokens


def completion(text: str, prompt_tokens: int = 7, reason: str = "stop") -> Completion:
    answer = Answer(0, text, (), reason)  # type: ignore[arg-type]
    return Completion((answer,), Usage(prompt_tokens, max(1, len(text.split()))))


def is_summary(messages: Messages) -> bool:
    return messages[0].role == "system" and ("summary" in text_of(messages[0]) or "摘要" in text_of(messages[0]))


@dataclass
class Model:
    """Answers by `answer`, summarises by `summarise` (both get the messages); `requests` and `summaries` remember."""

    limit: int
    count: Callable[[Messages], int] = words_counted
    answer: Callable[[Messages], str] = lambda messages: f"answer to {text_of(messages[-1])[-40:]}"
    summarise: Callable[[Messages], Completion | Exception] = lambda messages: completion("They talked.")
    requests: list[Messages] = field(default_factory=list)
    summaries: list[Messages] = field(default_factory=list)

    def ask(self, messages: Messages, sampling: SamplingParams) -> Completion:
        tokens = self.count(messages)
        assert sampling.max_tokens is not None
        assert tokens + sampling.max_tokens <= self.limit, f"{tokens} + {sampling.max_tokens} > {self.limit}"
        if is_summary(messages):
            self.summaries.append(messages)
            made = self.summarise(messages)
            if isinstance(made, Exception):
                raise made
            return made
        self.requests.append(messages)
        return completion(self.answer(messages), tokens)
