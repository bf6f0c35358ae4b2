"""Which tokens are computed next: continuous batching under a token budget, over paged blocks.

    waiting --admit: prefix lookup, blocks for all known tokens--> running --finish--> finished
       ^------------ preempt: blocks freed, recomputed later ---------'

A step takes decodes first, then prefills that are under way, then waiting sequences in order of arrival. A sequence
gets the blocks of everything it knows when it is admitted, so only decodes can lack a block; then the newest sequence
that is not in the step yet gives way. The oldest one can always run: the cache holds `max_model_len` tokens.

Knows sequences, blocks and budgets. Does not know tensors; what a step computed is told to `finish`. Nothing in
`schedule` reads a sampled id: one step may be planned while the one before it is in flight (not finished).
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterator
from typing import Any

from qvl.engine.batch import BlockCopy, ScheduledBatch, StepResult
from qvl.engine.block_manager import BlockManager
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.grammar import AnswerGrammar
from qvl.engine.pictures import Pictures
from qvl.engine.pixels import PromisedPixels
from qvl.engine.protocol import EngineStats, TokenOutput
from qvl.engine.sequence import Sequence, Status
from qvl.engine.step import SchedulerConfig, Step
from qvl.errors import ConfigError, InvalidRequest, PromptTooLong
from qvl.types import FinishReason, TokenLogprob


class Scheduler:
    """Owns every sequence from `add` to its end; each ends exactly once, in `finish` or in `abort`.

    Per step: `schedule`, run the batch, `finish`. Raises `ConfigError` when the cache cannot hold one full sequence.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, encoder_cache: EncoderCache[Any]) -> None:
        room = blocks.num_blocks * blocks.block_size
        if room < config.max_model_len:
            raise ConfigError(f"the KV cache holds {room} tokens, fewer than max_model_len {config.max_model_len}")
        self.config = config
        self.blocks = blocks
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._active: dict[str, Sequence] = {}
        self._num_arrived = 0
        self._num_in_flight = 0
        self._count: dict[str, int] = {}
        self.pictures = Pictures(config, encoder_cache, self.waiting, self._add)

    @property
    def has_work(self) -> bool:
        return bool(self._active)

    @property
    def awaited(self) -> AnswerGrammar | PromisedPixels | None:
        """What a sequence waits for; None when all are ready."""
        return next((awaited for seq in self.waiting if (awaited := seq.awaited) is not None), None)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence. Raises `PromptTooLong`; `InvalidRequest` for an empty prompt or an id in use."""
        if not seq.token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if seq.num_tokens >= self.config.max_model_len:
            raise PromptTooLong(seq.num_tokens, self.config.max_model_len)
        if seq.request_id in self._active:
            raise InvalidRequest("a request with this id is already running", param="request_id")
        self._num_arrived += 1
        seq.arrival = self._num_arrived
        longest = self.config.max_model_len
        seq.limit = min(seq.num_prompt_tokens + (seq.sampling.params.max_tokens or longest), longest)
        self._active[seq.request_id] = seq
        self.waiting.append(seq)
        self._add("prompt_tokens", seq.num_prompt_tokens)

    def abort(self, request_id: str) -> bool:
        """End a sequence now, its blocks and pictures are free at once. False when there is none with this id."""
        seq = self._active.get(request_id)
        if seq is None:
            return False
        self._end(seq, "abort")
        self._add("aborted", 1)
        return True

    # -- planning a step

    def schedule(self) -> ScheduledBatch:
        """The next step; empty only when there is no work, or all of it waits for what is to come."""
        step = Step(self.config)
        self._schedule_decodes(step)
        step.batch.num_decodes = len(step.batch.seqs)
        step.keep_decodes_moving(self.config.max_num_mixed_tokens)
        self._schedule_prefills(step)
        if not step.preempted:
            self._schedule_waiting(step)
        if step.batch.encode:
            self.pictures.encode_ahead(step, self._coming())
        may_be_empty = self._num_in_flight or not self.has_work or step.unprepared
        assert step.batch or may_be_empty, "a step without progress"
        self._num_in_flight += bool(step.batch)
        self._add("steps", 1)
        return step.batch

    def _schedule_decodes(self, step: Step) -> None:
        block_size = self.blocks.block_size
        for seq in tuple(self.running):
            if step.tokens_left == 0:
                return
            # Written out, not asked of `seq`: this is what a step of hundreds of decodes spends its time on.
            num_tokens = len(seq.token_ids) + seq.num_pending
            computed = seq.num_computed
            if num_tokens - computed != 1 or computed < seq.num_prompt_tokens or seq.status is not Status.RUNNING:
                continue
            if seq.num_pending and num_tokens >= seq.limit:  # the token in flight, not known yet, is its last
                continue
            if computed < len(seq.block_table) * block_size or self._grow(seq, step):
                step.add_decode(seq)

    def _grow(self, seq: Sequence, step: Step) -> bool:
        """Give a decode the block of its next token. False when it had to give way itself."""
        while (taken := self.blocks.take((), 1)) is None:
            victim = next(other for other in reversed(self.running) if other not in step)
            self._preempt(victim, step)
            if victim is seq:
                return False
        seq.block_table += taken
        return True

    def _preempt(self, seq: Sequence, step: Step) -> None:
        self.running.remove(seq)
        self._release(seq)
        seq.reset()
        insort(self.waiting, seq, key=lambda other: other.arrival)
        step.preempted = True
        self._add("preemptions", 1)

    def _schedule_prefills(self, step: Step) -> None:
        for seq in self.running:
            if step.tokens_left == 0:
                return
            if seq.num_computed < len(seq.token_ids) and not seq.is_decoding and seq not in step:
                num_tokens = self.pictures.prepare(seq, min(seq.num_to_compute, step.tokens_left), step)
                if num_tokens > 0:
                    step.add(seq, num_tokens)

    def _schedule_waiting(self, step: Step) -> None:
        """Admit in order of arrival, until one must wait; who waits for a prefix or for pixels lets others pass."""
        if not self.waiting or step.tokens_left == 0 or len(self.running) >= self.config.max_num_seqs:
            return
        promised = {key for seq in self.running for key in seq.keys[seq.num_registered :]}
        num_patient = 0
        for seq in tuple(self.waiting):
            if step.tokens_left == 0 or max(len(self.running), num_patient) >= self.config.max_num_seqs:
                return
            if seq.awaited is not None:
                step.unprepared = True
                continue
            # The last token is computed in any case: its logits choose the next one.
            findable = seq.keys[: (seq.num_tokens - 1) // self.blocks.block_size]
            hits = self.blocks.lookup(findable)
            num_missing = seq.num_tokens - len(hits) * self.blocks.block_size
            if self._is_worth_waiting(num_missing, findable[len(hits) :], promised):
                num_patient += 1
            elif self._admit(seq, hits, step):
                promised.update(findable[len(hits) :])
            else:
                return

    def _is_worth_waiting(self, num_missing: int, missing: list[bytes], promised: set[bytes]) -> bool:
        """Whether running prefills will soon have half of the `num_missing` tokens or more (as for n equal prompts)."""
        if not self.blocks.enable_prefix_caching:
            return False
        num_blocks = next((i for i, key in enumerate(missing) if key not in promised), len(missing))
        return num_blocks > 0 and 2 * num_blocks * self.blocks.block_size >= num_missing

    def _admit(self, seq: Sequence, hits: list[int], step: Step) -> bool:
        """Start (or resume) a waiting sequence with the blocks `hits` of its prefix. False when it must wait."""
        block_size = self.blocks.block_size
        num_new = -(-seq.num_tokens // block_size) - len(hits)
        # One spare block per running sequence: who comes in now should not be thrown out in the next step.
        table = self.blocks.take(hits, num_new, keep_free=len(self.running))
        if table is None:
            return False
        source, num_shared = self._beginning_of(seq, len(hits))
        seq.num_computed = len(hits) * block_size + num_shared
        num_tokens = self.pictures.prepare(seq, min(seq.num_to_compute, step.tokens_left), step)
        if num_tokens == 0:
            self.blocks.free(table)
            seq.num_computed = 0
            return False
        self.waiting.remove(seq)
        insort(self.running, seq, key=lambda other: other.arrival)
        seq.start_running(table, len(hits))
        if num_shared:
            step.batch.copies.append(BlockCopy(source, table[len(hits)]))
        self._add("prefix_queried_tokens", seq.num_tokens)
        self._add("prefix_hit_tokens", seq.num_computed)
        step.add(seq, num_tokens)
        return True

    def _beginning_of(self, seq: Sequence, index: int) -> tuple[int, int]:
        """A block that begins as block `index` of `seq` does, and how many tokens can be had from it."""
        opening = seq.opening(index) if self.blocks.enable_prefix_caching else None
        if opening is None:
            return 0, 0
        source, num_shared = self.blocks.lookup_opening(opening)
        return source, min(num_shared, seq.num_tokens - 1 - index * self.blocks.block_size)

    def _coming(self) -> Iterator[tuple[Sequence, int]]:
        """Prompts that are to be computed next, in their order, and from which token on."""
        for seq in (*self.running, *self.waiting):
            if seq.spans and seq.num_computed < seq.num_prompt_tokens and seq.awaited is None:
                waits = seq.status is Status.WAITING
                yield seq, len(self.blocks.lookup(seq.keys)) * self.blocks.block_size if waits else seq.num_computed

    # -- taking in what a step computed

    def finish(self, batch: ScheduledBatch, result: StepResult) -> list[TokenOutput]:
        """Append the sampled tokens, decide who is done, make full blocks findable; aborted sequences are passed over.

        To be called once per step, also after one that failed (with `StepResult.errors` for each of its sequences).
        """
        self._num_in_flight -= bool(batch)
        self.pictures.finish(batch)
        outputs: list[TokenOutput] = []
        tokens = iter(zip(result.token_ids, result.logprobs or itertools.repeat(None), strict=False))
        for entry in batch.seqs:
            seq = entry.seq
            token_id, logprob = next(tokens) if entry.samples else (0, None)
            seq.num_pending -= entry.samples
            if seq.status is Status.FINISHED:
                continue
            if result.errors and seq.request_id in result.errors:
                outputs.append(self._fail(seq, result.errors[seq.request_id]))
                continue
            end = entry.start + entry.num_tokens
            if end // self.blocks.block_size > seq.num_registered or seq.pinned:
                self._settle(seq, end)
            if entry.samples:
                outputs.append(self._append(seq, token_id, logprob))
        self._add("generated_tokens", sum(len(output.token_ids) for output in outputs))
        return outputs

    def _settle(self, seq: Sequence, end: int) -> None:
        """Tokens up to `end` are in the cache for good: register full blocks, let go of pictures behind them."""
        if seq.status is not Status.RUNNING:  # preempted while this step was in flight: the blocks are its own no more
            return
        full = end // self.blocks.block_size
        if self.blocks.enable_prefix_caching:
            for index in range(seq.num_registered, full):
                self.blocks.register(seq.block_table[index], seq.keys[index], seq.opening(index))
        seq.num_registered = max(seq.num_registered, full)
        self.pictures.release(seq, end)

    def _append(self, seq: Sequence, token_id: int, logprob: TokenLogprob | None) -> TokenOutput:
        seq.append(token_id)
        rules = seq.sampling
        reason: FinishReason | None = None
        stop_reason = None
        if (token_id in rules.stop_ids or token_id in rules.final_ids) and rules.ends(token_id, seq.num_output):
            reason = "stop"
            stop_reason = token_id if token_id in rules.params.stop_token_ids else None
        elif len(seq.token_ids) >= seq.limit:
            reason = "length"
        if reason is not None:
            self._end(seq, reason)
            self._add("finished", 1)
        logprobs = None if logprob is None else [logprob]
        return TokenOutput(seq.request_id, [token_id], logprobs, reason, stop_reason, seq.num_cached_tokens or 0)

    def _fail(self, seq: Sequence, message: str) -> TokenOutput:
        self._end(seq, "error")
        self._add("failed", 1)
        return TokenOutput(seq.request_id, [], finish_reason="error", error=message)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        (self.running if seq.status is Status.RUNNING else self.waiting).remove(seq)
        del self._active[seq.request_id]
        self._release(seq)
        seq.end(reason)

    def _release(self, seq: Sequence) -> None:
        """Give back the blocks and pictures of a sequence."""
        self.blocks.free(seq.block_table)
        seq.block_table = []
        self.pictures.release(seq)

    # -- looking in from outside

    def _add(self, counter: str, amount: int) -> None:
        self._count[counter] = self._count.get(counter, 0) + amount

    def stats(self) -> EngineStats:
        """Gauges now, counters since the start."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            kv_used_fraction=self.blocks.num_used / self.blocks.num_blocks,
            encoder_cache_bytes=self.pictures.cache.used_bytes,
            **self._count,
        )

    def check_integrity(self) -> None:
        """Blocks held are exactly the running sequences' blocks; queues and the index of ids agree."""
        self.blocks.check_integrity()
        self.pictures.cache.check_integrity()
        assert {seq.request_id for seq in (*self.running, *self.waiting)} == self._active.keys()
        assert self.blocks.num_used == len({block for seq in self.running for block in seq.block_table})
        assert not any(seq.block_table for seq in self.waiting)
