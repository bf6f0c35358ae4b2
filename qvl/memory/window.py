"""What a request may carry: which turns stay as they are, which are folded into a summary, which are left out.

Pure functions of numbers: costs in tokens and pictures in, a decision out. Knows the rules: system messages always
stay, a question and its answers leave together, the newest question always stays. Does not know tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from qvl.errors import ConfigError, PromptTooLong
from qvl.types import MediaPart, Message

Strategy: TypeAlias = Literal["summary", "window", "none"]
STRATEGIES: tuple[Strategy, ...] = ("summary", "window", "none")

LEAST_SUMMARY = 64  # tokens; less than that says nothing about a conversation
_MOST_ANSWER, _MOST_SUMMARY = 512, 1024


@dataclass(frozen=True, slots=True)
class Budget:
    """What one request may take. `tokens` is everything: prompt and answer.

    `answer` tokens of it are kept free for the answer, `summary` is the most that the running summary may take of the
    rest, `max_media` the most pictures and videos of one request (None: the server says no if there are too many, and
    that is learnt from). `least`: what is left for the answer at least where the newest turn alone takes so much that
    it cannot be `answer` (None: such a turn is too long). Raises `ConfigError` for numbers that leave no room.
    """

    tokens: int
    answer: int
    summary: int
    max_media: int | None = None
    least: int | None = None

    def __post_init__(self) -> None:
        if self.answer < 1 or self.summary < LEAST_SUMMARY or (self.max_media is not None and self.max_media < 0):
            raise ConfigError(f"a budget keeps at least 1 token for the answer and {LEAST_SUMMARY} for a summary")
        if self.room < self.summary:
            raise ConfigError(
                f"a budget of {self.tokens} tokens with {self.answer} for the answer leaves {self.room} for the "
                f"conversation: give it at least {self.answer + 2 * self.summary}"
            )

    @classmethod
    def of(cls, tokens: int, *, answer: int | None = None, max_media: int | None = None) -> Budget:
        """A budget with usual shares: a quarter (at most 512) for the answer, an eighth of the rest for a summary."""
        kept = max(1, min(_MOST_ANSWER, tokens // 4)) if answer is None else answer
        summary = max(LEAST_SUMMARY, min(_MOST_SUMMARY, (tokens - kept) // 8))
        return cls(tokens, kept, summary, max_media)

    @property
    def room(self) -> int:
        """The most tokens that a prompt may have."""
        return self.tokens - self.answer

    @property
    def limit(self) -> int:
        """The most tokens that what must stay may have."""
        return self.room if self.least is None else self.tokens - self.least


@dataclass(frozen=True, slots=True)
class Cost:
    """What an exchange takes: tokens of the prompt, pictures and videos."""

    tokens: int
    media: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.media + other.media)

    def fits(self, tokens: int, media: int | None) -> bool:
        """Whether it fits into `tokens` and `media` (None: any number)."""
        return self.tokens <= tokens and (media is None or self.media <= media)


Exchange: TypeAlias = tuple[int, ...]  # indices of messages that leave together, ascending


@dataclass(frozen=True, slots=True)
class Shape:
    """A conversation taken apart, as indices of its messages: what always stays, what may leave, what is asked now."""

    pinned: tuple[int, ...]
    older: tuple[Exchange, ...]
    newest: Exchange

    def split_newest(self, messages: Sequence[Message]) -> Shape | None:
        """The same with only the newest user turn as what is asked now; None where it is alone already."""
        users = 0
        while users < len(self.newest) and messages[self.newest[users]].role == "user":
            users += 1
        if users < 2:
            return None
        early, late = self.newest[: users - 1], self.newest[users - 1 :]
        return Shape(self.pinned, (*self.older, early), late)


def take_apart(messages: Sequence[Message]) -> Shape:
    """System messages stay. An exchange begins with user turns (one, or several in a row) and goes up to the next."""
    pinned = tuple(index for index, message in enumerate(messages) if message.role == "system")
    groups: list[list[int]] = []
    before = "none"
    for index, message in enumerate(messages):
        if message.role == "system":
            continue
        if not groups or (message.role == "user" and before != "user"):
            groups.append([])
        groups[-1].append(index)
        before = message.role
    exchanges = [tuple(group) for group in groups]
    return Shape(pinned, tuple(exchanges[:-1]), exchanges[-1] if exchanges else ())


def count_media(messages: Sequence[Message]) -> int:
    """Pictures and videos of `messages`."""
    return sum(isinstance(part, MediaPart) for message in messages for part in message.parts)


def keep_newest(older: Sequence[Cost], fixed: Cost, tokens: int, media: int | None) -> int:
    """How many of the newest of `older` (in order of time) fit beside `fixed` without a gap."""
    kept = 0
    for cost in reversed(older):
        fixed += cost
        if not fixed.fits(tokens, media):
            break
        kept += 1
    return kept


@dataclass(frozen=True, slots=True)
class Decision:
    """Of the exchanges before the newest: fold the `fold` oldest into the summary, then send the `keep` newest.

    Those in between are dropped from this request. `with_summary` says whether the running summary goes in.
    """

    fold: int
    keep: int
    with_summary: bool


def keep_steadily(older: Sequence[Cost], fixed: Cost, budget: Budget, stayed: int | None) -> int:
    """How many of the newest of `older` to keep where not all can stay, so that the next requests begin like this one.

    What begins alike is found in the prefix cache, so more leaves at a time than must: a quarter of the room. Until
    that is used up all that `stayed` the last time (and came since) stays again.
    """
    room, media = budget.room, _media_beside(fixed, budget)
    most = keep_newest(older, fixed, room, media)
    if most == len(older):
        return most
    less = None if media is None else max(fixed.media, media - media // 4)
    least = keep_newest(older, fixed, room - (room - fixed.tokens) // 4, less)
    kept = stayed if stayed is not None and least <= stayed <= most else least
    return max(kept, min(1, most))


def decide(
    older: Sequence[Cost],
    newest: Cost,
    budget: Budget,
    strategy: Strategy,
    summary_tokens: int | None = None,
    stayed: int | None = None,
) -> Decision:
    """What to send. `newest` is the newest exchange with the system messages and everything else that always stays;
    `older` the exchanges before it that no summary covers, in order of time; `summary_tokens` the cost of the running
    summary, None when there is none; `stayed`: of `older` those from where the last request was cut.

    Raises `PromptTooLong` when `newest` alone, or with strategy "none" everything, does not fit.
    """
    room, media = budget.room, _media_beside(newest, budget)
    if newest.tokens > room:
        raise too_long(newest.tokens, budget)
    if strategy == "none":
        total = sum((cost.tokens for cost in older), newest.tokens)
        if total > room:
            raise too_long(total, budget, whole=True)
        return Decision(0, len(older), False)
    with_summary = summary_tokens is not None and newest.tokens + summary_tokens <= room
    fixed = newest + Cost(summary_tokens or 0) if with_summary else newest
    keep = keep_steadily(older, fixed, budget, stayed)
    full = newest + Cost(budget.summary)
    if strategy == "window" or keep == len(older) or full.tokens > room:
        return Decision(0, keep, with_summary)
    # Folding asks the model: fold down to half of the room (and of the pictures), so that the next turns need none.
    half = None if media is None else max(newest.media, media // 2)
    kept = keep_newest(older, full, full.tokens + (room - full.tokens) // 2, half)
    return Decision(len(older) - kept, kept, True)


def _media_beside(newest: Cost, budget: Budget) -> int | None:
    """The pictures of what is asked now always go: a limit below them is for the server to state."""
    return None if budget.max_media is None else max(budget.max_media, newest.media)


def too_long(num_tokens: int, budget: Budget, *, whole: bool = False) -> PromptTooLong:
    """The error that says what does not fit, and what to do."""
    what = "The conversation takes" if whole else "The newest turn and the system message alone take"
    mend = "use the strategy summary or window" if whole else "shorten the turn or send smaller pictures (max_pixels)"
    hint = f"{what} {num_tokens}; {budget.answer} are kept for the answer, which leaves {budget.room}: {mend}"
    return PromptTooLong(num_tokens, budget.tokens, f"{hint}, or raise the budget")
