"""What an engine says about the answers to one prompt becomes text: `TokenOutput`s in, `Delta`s out.

Knows text, stop strings and counts. Does not know who asked, nor how the outputs travelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qvl.engine.detokenizer import Detokenizer, TokenBytes
from qvl.engine.protocol import TokenOutput
from qvl.errors import RequestFailed
from qvl.types import Answer, Completion, Delta, FinishReason, SamplingParams, TokenLogprob, Usage


class LiveAnswers:
    """The `n` answers to one prompt while they grow.

    `sampling` is resolved; `prefix` is put in front of every answer's text (an echoed prompt).
    """

    def __init__(
        self, num_prompt_tokens: int, sampling: SamplingParams, tokenizer: TokenBytes, prefix: str = ""
    ) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._answers = [_LiveAnswer(sampling, tokenizer, prefix) for _ in range(sampling.n)]
        self._generated = 0
        self.num_open = sampling.n  # answers that have not ended

    def take(self, index: int, outputs: Sequence[TokenOutput]) -> Delta | None:
        """What these outputs add to answer `index`; None while there is nothing to show for them.

        Raises `RequestFailed` when the engine gave the answer up.
        """
        answer = self._answers[index]
        if answer.ended:
            return None
        before = answer.num_tokens
        try:
            piece = answer.take(outputs)
        finally:
            self.num_open -= answer.ended
        self._generated += answer.num_tokens - before
        if not piece.text and piece.finish_reason is None:
            answer.keep(piece)
            return None
        logprobs = None if piece.logprobs is None else tuple(piece.logprobs)
        token_ids = tuple(piece.token_ids)
        return Delta(index, piece.text, token_ids, logprobs, piece.finish_reason, piece.stop_reason, self.usage)

    def must_abort(self, index: int) -> bool:
        """Whether a stop string ended this answer, of which the engine does not know."""
        return self._answers[index].stopped_by_text

    @property
    def usage(self) -> Usage:
        """Exact counts so far, of all answers together."""
        return Usage(self._num_prompt_tokens, self._generated, self._answers[0].num_cached_tokens)


@dataclass(slots=True)
class _Piece:
    """Tokens, and the text that they made certain."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def follow(self, kept: _Piece) -> None:
        """Put what was kept back in front."""
        self.text = kept.text + self.text
        self.token_ids = kept.token_ids + self.token_ids
        if self.logprobs is not None:
            self.logprobs = (kept.logprobs or []) + self.logprobs


class _LiveAnswer:
    """One answer. Ids that have no text of their own yet (half a character) wait for the next text."""

    def __init__(self, sampling: SamplingParams, tokenizer: TokenBytes, prefix: str) -> None:
        self._detokenizer = Detokenizer(tokenizer, sampling)
        self._wants_logprobs = sampling.logprobs is not None
        self._kept: _Piece | None = _Piece(prefix, [], [] if self._wants_logprobs else None)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.ended = False
        self.stopped_by_text = False

    def take(self, outputs: Sequence[TokenOutput]) -> _Piece:
        """Hot: once per token and answer."""
        last = outputs[-1]
        if last.finish_reason == "error":
            self.ended = True
            raise RequestFailed(last.error or "the engine gave this request up")
        if len(outputs) == 1:
            token_ids = last.token_ids
        else:
            token_ids = [token_id for output in outputs for token_id in output.token_ids]
        text, count, stop = self._detokenizer.feed(token_ids, last.finish_reason)
        self.num_tokens += count
        self.num_cached_tokens = max(self.num_cached_tokens, last.num_cached_tokens)
        logprobs = None
        if self._wants_logprobs:
            logprobs = [entry for output in outputs for entry in output.logprobs or ()][:count]
        piece = _Piece(text, token_ids[:count], logprobs, last.finish_reason, last.stop_reason)
        if stop is not None:
            piece.finish_reason, piece.stop_reason = "stop", stop
            self.stopped_by_text = last.finish_reason is None
        self.ended = piece.finish_reason is not None
        if self._kept is not None:
            piece.follow(self._kept)
            self._kept = None
        return piece

    def keep(self, piece: _Piece) -> None:
        """Nothing to show yet: comes again with the next piece."""
        self._kept = piece


@dataclass(slots=True)
class _Draft:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason = "abort"
    stop_reason: str | int | None = None


class Collector:
    """Deltas, joined: what a caller gets who does not stream."""

    def __init__(self) -> None:
        self._drafts: dict[int, _Draft] = {}
        self._usage = Usage()

    def add(self, delta: Delta) -> None:
        draft = self._drafts.setdefault(delta.index, _Draft())
        draft.texts.append(delta.text)
        draft.token_ids += delta.token_ids
        if delta.logprobs is not None:
            draft.logprobs = (draft.logprobs or []) + list(delta.logprobs)
        if delta.finish_reason is not None:
            draft.finish_reason, draft.stop_reason = delta.finish_reason, delta.stop_reason
        self._usage = delta.usage

    def fail(self, n: int, usage: Usage) -> None:
        """Whatever of the `n` answers has not ended ends in error."""
        for index in range(n):
            draft = self._drafts.setdefault(index, _Draft())
            draft.finish_reason = "error" if draft.finish_reason == "abort" else draft.finish_reason
        self._usage = usage

    def completion(self) -> Completion:
        """All answers, in the order of their index."""
        return Completion(tuple(self._answer(index) for index in sorted(self._drafts)), self._usage)

    def _answer(self, index: int) -> Answer:
        draft = self._drafts[index]
        logprobs = None if draft.logprobs is None else tuple(draft.logprobs)
        text = "".join(draft.texts)
        return Answer(index, text, tuple(draft.token_ids), draft.finish_reason, draft.stop_reason, logprobs)
