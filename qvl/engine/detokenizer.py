"""Token ids to text as they come: whole characters only, nothing that may yet become a stop string.

The pieces joined are exactly `tokenizer.decode` of all ids (up to the stop). A token costs its own bytes, however long
the answer already is. Knows bytes of tokens and stop strings. Does not know the engine: who owns a `Detokenizer` aborts
the sequence when it says that a stop string was reached.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from qvl.types import FinishReason, SamplingParams


class TokenBytes(Protocol):
    """What is needed of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...


class Piece(NamedTuple):
    """Text gained. `stop`: the stop string that ended the answer, with the first `num_tokens` of the ids fed."""

    text: str
    num_tokens: int
    stop: str | None = None


class StopMatcher:
    """How much of one stop string the end of the text spells, one character at a time (Knuth-Morris-Pratt)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        # back[n]: the longest shorter beginning of `stop` with which its first n characters end
        self._back = [0, 0]
        for char in stop[1:]:
            self._back.append(self._next(self._back[-1], char))

    def _next(self, matched: int, char: str) -> int:
        while matched and (matched == len(self.stop) or self.stop[matched] != char):
            matched = self._back[matched]
        return matched + (self.stop[matched] == char)

    @property
    def pending(self) -> int:
        """Characters at the end of the text that may still become the stop string."""
        return self._back[self.matched] if self.matched == len(self.stop) else self.matched

    def feed(self, char: str) -> bool:
        """Whether `char` completes the stop string."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.stop)


class Detokenizer:
    """The text of one answer.

    Uses `stop`, `min_tokens`, `include_stop_str_in_output` and `skip_special_tokens` of `sampling`. Of several stop
    strings the one that is complete first ends the answer, the longest of those complete at once; so the text does not
    depend on how it was cut into tokens. A stop string that is complete within the first `min_tokens` tokens is text
    like any other.
    """

    def __init__(self, tokenizer: TokenBytes, sampling: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._skipped = tokenizer.special_ids if sampling.skip_special_tokens else frozenset()
        self._rest = b""  # the beginning of a character
        self._matchers = [StopMatcher(stop) for stop in dict.fromkeys(sampling.stop)]
        self._held = ""
        self._num_tokens = 0
        self._done = False

    def feed(self, token_ids: Sequence[int], finish_reason: FinishReason | None = None) -> Piece:
        """Text that these ids make certain. With a `finish_reason` everything held back follows.

        `finish_reason` "stop" comes from the engine and means that the last id is an end token or one of
        `stop_token_ids`: it is no part of the text, unless `include_stop_str_in_output` asks for it.
        """
        assert not self._done, "fed after the end"
        if finish_reason is None and not self._matchers and len(token_ids) == 1:  # hot: nearly every call
            self._num_tokens += 1
            return Piece("" if token_ids[0] in self._skipped else self._decode(token_ids[0]), 1)
        self._done = finish_reason is not None
        num_spelt = len(token_ids)
        if finish_reason == "stop" and not self._sampling.include_stop_str_in_output:
            num_spelt -= 1
        text = ""
        for number, token_id in enumerate(token_ids[:num_spelt]):
            self._num_tokens += 1
            gained, stop = self._release("" if token_id in self._skipped else self._decode(token_id))
            text += gained
            if stop is not None:
                self._done = True
                return Piece(text, number + 1, stop)
        if finish_reason is not None:
            gained, stop = self._release(self._rest.decode("utf-8", "replace"))
            self._rest = b""
            text += gained
            if stop is not None:
                return Piece(text, num_spelt, stop)
            text += self._held
            self._held = ""
        return Piece(text, len(token_ids))

    def _decode(self, token_id: int) -> str:
        """The whole characters that this token completes."""
        data = self._rest + self._tokenizer.token_bytes(token_id)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def _release(self, new: str) -> tuple[str, str | None]:
        """What may be said after `new` characters, and the stop string that they complete."""
        if not self._matchers:
            return new, None
        include = self._sampling.include_stop_str_in_output
        stops_count = self._num_tokens > self._sampling.min_tokens
        held = len(self._held)
        self._held += new
        for place, char in enumerate(new, start=held + 1):
            complete = [matcher.stop for matcher in self._matchers if matcher.feed(char)]
            if complete and stops_count:
                stop = max(complete, key=len)
                return self._held[: place if include else place - len(stop)], stop
        keep = 0 if include else max(matcher.pending for matcher in self._matchers)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, None
