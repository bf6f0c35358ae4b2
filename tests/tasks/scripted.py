"""A model that gives the answers it was told to, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from qvl.types import Delta, FinishReason, MediaPart, Message, SamplingParams, TextPart, Usage

Messages = tuple[Message, ...]
PIECE = 3  # characters that come at a time

Answer = str | Exception | Callable[[Messages], str]


@dataclass
class Scripted:
    """The n-th question gets the n-th answer, the last one repeats; an exception is raised, a function is called."""

    answers: list[Answer]
    finish_reason: FinishReason = "stop"
    asked: list[tuple[Messages, SamplingParams]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stream(self, messages: Messages, sampling: SamplingParams, /) -> Iterator[Delta]:
        with self.lock:
            self.asked.append((messages, sampling))
            answer = self.answers[min(len(self.asked), len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        text = answer if isinstance(answer, str) else answer(messages)
        for at in range(0, len(text), PIECE):
            yield Delta(0, text[at : at + PIECE])
        yield Delta(0, "", (), None, self.finish_reason, None, Usage(5, len(text)))

    def prompts(self) -> list[str]:
        """The text of each question's last turn."""
        return ["".join(p.text for p in m[-1].parts if isinstance(p, TextPart)) for m, _ in self.asked]

    def media(self) -> list[object]:
        """What was shown, in order."""
        return [p.source for m, _ in self.asked for turn in m for p in turn.parts if isinstance(p, MediaPart)]
