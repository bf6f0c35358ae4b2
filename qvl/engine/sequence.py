"""The state of one request inside the engine.

    token_ids   |<-------- prompt -------->|<--- output --->|
    computed    |<--- num_computed --->|                         keys and values are in the blocks of block_table
    unknown                                                |..|  num_pending: sampled on the device, id not here yet

Knows its tokens, pictures, positions, blocks and sampling state. Does not know other sequences, budgets, or torch.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qvl.engine.grammar import AnswerGrammar
from qvl.engine.pixels import PromisedPixels
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.prompt import Opening, Span, block_keys, extend_key, mrope_positions, opening_of, root_key
from qvl.specs import ModelSpec
from qvl.types import FinishReason, SamplingParams

MIN_TEMPERATURE = 1e-5  # below this, dividing by the temperature would overflow and the choice is the greedy one anyway


class Status(enum.Enum):
    """Where a sequence stands; every sequence ends in FINISHED exactly once."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def is_greedy(sampling: SamplingParams) -> bool:
    """Whether the most likely token is always the one."""
    return (sampling.temperature or 0.0) < MIN_TEMPERATURE or sampling.top_k == 1


def wants_penalties(sampling: SamplingParams) -> bool:
    """Whether any of the three penalties changes the scores."""
    return (
        sampling.repetition_penalty not in (None, 1.0)
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How one sequence chooses tokens and which of them end it.

    `params` is resolved (only `logprobs`, `seed` and `constraint` may be None); `seed` is from 0 to 2^63 - 1. Noise is
    a function of (`seed`, number of output tokens so far) and of nothing else, so that an answer does not depend on the
    batch. `stop_ids`: the end tokens (unless `ignore_eos`) and `stop_token_ids`. `masked_ids` may not be sampled
    while the answer is shorter than `min_tokens`; they include the end tokens even with `ignore_eos`. `final_ids`: the
    end tokens of a constrained answer, which `min_tokens` and `ignore_eos` only put off while anything else may follow.
    `is_plain`: every token is the most likely one, and nothing else is asked about it.
    """

    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    masked_ids: tuple[int, ...]
    final_ids: frozenset[int] = frozenset()
    is_plain: bool = False

    @classmethod
    def create(cls, params: SamplingParams, eos: tuple[int, ...], fallback_seed: int) -> SamplingState:
        """`fallback_seed` is used when the request has none of its own."""
        seed = fallback_seed if params.seed is None else params.seed
        asked = frozenset(params.stop_token_ids)
        stop_ids = asked if params.ignore_eos else asked | frozenset(eos)
        masked_ids = tuple(sorted(asked | frozenset(eos))) if params.min_tokens else ()
        final_ids = frozenset(eos) if params.constraint is not None else frozenset()
        asks_more = params.constraint is not None or params.logprobs is not None or bool(params.logit_bias)
        is_plain = is_greedy(params) and not (asks_more or masked_ids or wants_penalties(params))
        return cls(params, seed % (1 << 63), stop_ids, masked_ids, final_ids, is_plain)

    def banned(self, num_output: int) -> tuple[int, ...]:
        """Ids that may not become output token number `num_output` (from 0), beside those the model never samples."""
        if num_output < self.params.min_tokens:
            return self.masked_ids
        return tuple(self.final_ids) if self.params.ignore_eos else ()

    def ends(self, token_id: int, num_output: int) -> bool:
        """Whether `token_id`, as the last of `num_output` tokens, ends the answer."""
        return token_id in self.final_ids or (token_id in self.stop_ids and num_output > self.params.min_tokens)


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine, from `add` to its end. Compared by identity.

    `pixels[i]` belongs to `media[i]` and `spans[i]`: what the vision step turns into patches; the engine sets it, and
    it is None after the end. `keys` holds one prefix-cache key per full block. `num_cached_tokens` counts the prompt
    tokens that the first admission found in the prefix cache (None before it). `grammar` is what a constrained answer
    must keep to, as far as its output has come; it is let go at the end. `limit`: the answer ends at so many tokens,
    prompt included; the scheduler sets it.
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    spans: tuple[Span, ...]
    media: tuple[MediaInput, ...]
    pixels: list[Any]
    sampling: SamplingState
    salt: bytes
    prompt_positions: npt.NDArray[np.int64]
    rope_delta: int
    block_size: int
    keys: list[bytes]
    grammar: AnswerGrammar | None = None
    arrival: int = 0
    limit: int = 0
    status: Status = Status.WAITING
    num_computed: int = 0
    num_pending: int = 0
    num_registered: int = 0
    block_table: list[int] = field(default_factory=list)
    pinned: set[int] = field(default_factory=set)
    num_cached_tokens: int | None = None
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @classmethod
    def create(
        cls,
        request: AddRequest,
        spec: ModelSpec,
        *,
        block_size: int,
        fallback_seed: int | None = None,
        pixels: list[Any] | None = None,
        grammar: AnswerGrammar | None = None,
    ) -> Sequence:
        """A waiting sequence. Keys and positions are computed here, once.

        `pixels` holds one array per `request.media`. `fallback_seed` is used when the request has no seed of its own;
        None draws one.
        """
        spans = tuple(Span(m.kind, m.offset, m.length, m.grid, m.digest) for m in request.media)
        ids = list(request.token_ids)
        positions, rope_delta = mrope_positions(len(ids), spans, spec.vision.merge_size)
        seed = random.getrandbits(63) if fallback_seed is None else fallback_seed
        return cls(
            request_id=request.request_id,
            token_ids=ids,
            num_prompt_tokens=len(ids),
            spans=spans,
            media=tuple(request.media),
            pixels=list(pixels) if pixels is not None else [None] * len(spans),
            sampling=SamplingState.create(request.sampling, spec.ids.eos, seed),
            salt=request.salt,
            prompt_positions=positions,
            rope_delta=rope_delta,
            block_size=block_size,
            keys=block_keys(ids, spans, block_size, request.salt),
            grammar=grammar,
        )

    @property
    def awaited(self) -> AnswerGrammar | PromisedPixels | None:
        """What is to come before anything can be computed: its grammar, or pixels that are still being decoded."""
        if self.grammar is not None and not self.grammar.is_ready:
            return self.grammar
        return next((one for one in self.pixels if isinstance(one, PromisedPixels) and not one.is_ready), None)

    @property
    def num_tokens(self) -> int:
        """Tokens whose ids the host knows: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        """Output tokens whose ids the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_to_compute(self) -> int:
        """Tokens that are known (or pending on the device) and not computed yet."""
        return len(self.token_ids) + self.num_pending - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether the only thing left to compute is one generated token."""
        return self.num_to_compute == 1 and self.num_computed >= self.num_prompt_tokens

    def positions(self, start: int, num_tokens: int) -> npt.NDArray[np.int64]:
        """M-RoPE positions int64 [3, num_tokens] from token `start` on; generated token i stands at i + rope_delta."""
        end = start + num_tokens
        if end <= self.num_prompt_tokens:
            return self.prompt_positions[:, start:end]
        generated = np.arange(max(start, self.num_prompt_tokens), end, dtype=np.int64) + self.rope_delta
        tail = np.broadcast_to(generated, (3, len(generated)))
        return np.concatenate([self.prompt_positions[:, start:], tail], axis=1)

    def spans_in(self, start: int, num_tokens: int) -> list[int]:
        """Indices of the pictures with at least one token in [start, start + num_tokens), in order."""
        end = start + num_tokens
        return [i for i, s in enumerate(self.spans) if s.offset < end and s.end > start]

    def opening(self, index: int) -> Opening | None:
        """How block `index` begins, as far as it lies in the prompt; None when it does not, or holds a picture only."""
        start = index * self.block_size
        ids = self.token_ids[start : min(start + self.block_size, self.num_prompt_tokens)]
        parent = self.keys[index - 1] if index else root_key(self.salt)
        return opening_of(parent, ids, self.spans, start) if ids else None

    def append(self, token_id: int) -> None:
        """Add a sampled token; the key of a block that it completes is added with it."""
        self.token_ids.append(token_id)
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if len(self.token_ids) % self.block_size == 0:
            start = len(self.token_ids) - self.block_size
            parent = self.keys[-1] if self.keys else root_key(self.salt)
            # The block that begins in the prompt may hold the end of a picture.
            spans = self.spans if start < self.num_prompt_tokens else ()
            self.keys.append(extend_key(parent, self.token_ids[start:], spans, start))

    def start_running(self, block_table: list[int], num_hits: int) -> None:
        """Admitted: these blocks are its own now, the first `num_hits` of them and `num_computed` tokens found."""
        self.status = Status.RUNNING
        self.block_table = block_table
        self.num_registered = num_hits
        if self.num_cached_tokens is None:
            self.num_cached_tokens = self.num_computed

    def reset(self) -> None:
        """Back to waiting with nothing computed (preemption); the caller has freed the blocks."""
        self.status = Status.WAITING
        self.num_computed = 0
        self.num_preemptions += 1

    def end(self, reason: FinishReason) -> None:
        """The one transition to FINISHED; lets go of the pixels and of the grammar."""
        assert self.status is not Status.FINISHED, self.request_id
        self.status = Status.FINISHED
        self.finish_reason = reason
        self.pixels = [None] * len(self.spans)
        self.grammar = None
