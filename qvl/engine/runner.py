"""Owns the model, its KV cache and the sampler, and carries out one scheduled step.

Knows devices and tensors. Decides nothing: which tokens, which blocks and which pictures is the scheduler's word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.batch import ScheduledBatch, ScheduledSeq, StepResult
from qvl.engine.config import EngineConfig
from qvl.engine.device import DTYPES, is_out_of_memory, own_stream, release_cached_memory
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.gpu_sampler import make_sampler
from qvl.engine.grammar import Words
from qvl.engine.graphs import CudaRecorder, DecodeSteps, Recorder, StaticSteps, record_all
from qvl.engine.host_memory import FreedMemory
from qvl.engine.inputs import MediaRows, StepNumbers, build_inputs, decode_numbers, step_numbers
from qvl.engine.masks import Masking, Masks
from qvl.engine.memory import Own, graph_bytes, kv_cache_bytes, usable_bytes
from qvl.engine.probe import measure_cost, warm_up
from qvl.engine.prompt_graphs import PromptSteps, joins_gate_and_up
from qvl.engine.rows import SequenceRows
from qvl.engine.sampler import FAILED, Drawing, SamplerRow
from qvl.engine.start_clock import StartClock
from qvl.engine.tower_graphs import TowerSteps
from qvl.engine.trials import try_kernels_out
from qvl.engine.vision import MediaEncoder
from qvl.kernels.segments import segment_kernel
from qvl.layers.attention import KVCache, make_kv_cache
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.models.registry import build_model
from qvl.models.weights import LoadFormat, load_weights
from qvl.types import TokenLogprob

logger = logging.getLogger("qvl.engine")

NOT_FINITE = (
    "the model's scores for this request are not finite numbers (an overflow of the number format); "
    "a wider dtype, bfloat16 or float32, is the remedy"
)
STEP_OUT_OF_MEMORY = (
    "out of memory while computing this request; lower gpu_memory_utilization or max_num_batched_tokens"
)


@dataclass(slots=True)
class Flight:
    """A step that was launched: what of `batch` is computed, and what it left on the device.

    `errors` says which requests cannot be computed, and why. `logits` and `best` [m, vocab] and [m] wait for `sample`.
    """

    batch: ScheduledBatch
    entries: Items[ScheduledSeq]
    num_decodes: int
    errors: dict[str, str] = field(default_factory=dict)
    sampling: list[ScheduledSeq] = field(default_factory=list)
    places: npt.NDArray[np.int64] | None = None  # rows of those that sample, here and on the device
    rows: Tensor | None = None
    logits: Tensor | None = None
    best: Tensor | None = None
    masking: Masking | None = None
    waits: bool = False  # what may be sampled depends on a token that the host does not know yet
    drawing: Drawing | None = None


class ModelRunner:
    """Loads the model of `config` onto its device and runs steps; `config` has its `num_blocks` afterwards.

    `launch`, `sample`, `collect`: only the last one waits for the device, and another step may be launched before it.
    Raises `CheckpointError` and `ConfigError` (a given max_model_len does not fit into the memory that is left).
    """

    def __init__(self, config: EngineConfig, clock: StartClock | None = None) -> None:
        clock = clock or StartClock()
        torch.set_num_threads(config.num_threads)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
        )
        self.stream = own_stream(self.device) if config.device == "cuda" else None
        with self._on_stream():
            self.model = load_model(config, self.device, clock)
            self.freed = FreedMemory() if config.device == "cpu" else None
            self.config = config = size_kv_cache(config, self.model)
            clock.passed("first steps")
            assert config.num_blocks is not None
            self.kv_cache: KVCache = make_kv_cache(
                config.spec.text, config.num_blocks, config.block_size, self.model.dtype, self.device
            )
            width = -(-config.max_model_len // config.block_size)
            self.tables = SequenceRows(config.max_num_seqs, width, self.device)
            self.encoder_cache: EncoderCache[Tensor] = EncoderCache(config.encoder_cache_bytes)
            self.encoder = MediaEncoder(self.model, self.encoder_cache, config.spec.processor)
            self._failed_before: dict[bytes, str] = {}  # pictures of the step that was launched last
            ids, vocab_size = config.spec.ids, config.spec.text.vocab_size
            self.sampler = make_sampler(
                vocab_size, config.max_num_seqs, tuple(ids.never_sampled), self.device, self.model.compute_dtype
            )
            self.masks = Masks(vocab_size, ends=ids.eos, never=ids.never_sampled)
            self.decodes: DecodeSteps | None = None
            self.prompts: PromptSteps | None = None
            if self.device.type == "cuda" and self.model.attention.graph_safe:
                clock.passed("caches")
                room = graph_bytes(config, own_kernels(self.model))
                self.prepare_static(None if config.enforce_eager else CudaRecorder(room, self.device))
                clock.passed("graphs")
        if self.stream is not None:
            self.stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    @torch.inference_mode()
    def prepare_static(self, recorder: Recorder | None) -> None:
        """Run steps of decodes alone, and of few tokens, and pictures over static memory from now on."""
        with self._on_stream():
            self.decodes = DecodeSteps(self.config, self.model, self.kv_cache, self.tables, self.sampler)
            kinds: list[StaticSteps] = [self.decodes]
            if self.model.attention.tile_tokens:
                self.prompts = PromptSteps(self.config, self.model, self.kv_cache, self.tables)
                kinds.append(self.prompts)  # it fits into the memory of the logits of decodes
            if recorder is not None:
                record_all(recorder, kinds, self.device)
            if (kernel := tower_kernel(self.model)) is not None:
                later = recorder if self.decodes.replays else None
                self.encoder.towers = TowerSteps(self.model.visual, kernel, self.device, later)

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> Flight:
        """Encode the step's pictures and compute its tokens; its samples too, unless they must wait for the host.

        What goes wrong for one request is in `errors`.
        """
        if self.freed is not None:
            self.freed.give_back()
        with self._on_stream():
            for copy in batch.copies:
                self.kv_cache.copy_block(copy.source, copy.target)
            failed = self.encoder.encode(batch.encode)
            # This step was planned before anybody heard of what failed in the one before.
            flight = healthy_part(batch, self._failed_before | failed)
            self._failed_before = failed
            with self._memory_may_run_out(flight):
                if flight.entries:
                    self._compute(flight)
                    if not flight.waits:
                        self._draw(flight)
            if self.encoder.towers is not None:
                self.encoder.towers.record_wanted()  # now, as the device has a step to compute
        return flight

    @torch.inference_mode()
    def sample(self, flight: Flight) -> None:
        """The rest of `launch`, once the tokens of the step before are known to the sequences."""
        with self._on_stream(), self._memory_may_run_out(flight):
            if flight.logits is not None:
                self._draw(flight)

    @contextmanager
    def _memory_may_run_out(self, flight: Flight) -> Iterator[None]:
        """Then every request of the step fails, and the engine goes on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release_cached_memory(self.device)
            flight.logits = flight.drawing = None
            flight.errors.update({entry.seq.request_id: STEP_OUT_OF_MEMORY for entry in flight.entries})

    def _compute(self, flight: Flight) -> None:
        """The forward pass, up to the logits of those that sample."""
        entries = flight.entries
        flight.sampling = [entry for entry in entries if entry.samples]
        constrained = [entry for entry in flight.sampling if entry.seq.grammar is not None]
        flight.waits = any(entry.end > entry.seq.num_tokens for entry in constrained)
        if constrained and not flight.waits:
            flight.masking = self.masks.start(flight.sampling)
        if self.decodes is not None and flight.num_decodes == len(entries):
            self._decode(flight, self.decodes)
            return
        numbers = step_numbers(entries, flight.num_decodes, self.config.block_size, self.tables)
        hidden_states, rows = self._forward(numbers)
        if flight.sampling:
            flight.places, flight.rows = numbers.sampling_rows, rows
            flight.logits = self.model.logits(hidden_states)
            flight.best = self.sampler.best(flight.logits)
            self.tables.remember(flight.rows, flight.best)

    def _decode(self, flight: Flight, decodes: DecodeSteps) -> None:
        flight.places = self.tables.place(flight.entries)
        decoded = decodes.run(decode_numbers(flight.entries, flight.places, self.tables, self.config.block_size))
        flight.rows, flight.logits, flight.best = decoded.rows, decoded.logits, decoded.best

    def _forward(self, numbers: StepNumbers) -> tuple[Tensor, Tensor]:
        """What the network makes of the last tokens of those that sample, and the rows of these."""
        if self.prompts is not None:
            shape = self.prompts.shape_for(numbers)
            if shape is not None:
                return self.prompts.run(shape, numbers, self._embed)
        inputs = build_inputs(numbers, self.config.block_size, self.tables)
        hidden_states = self._embed(inputs.token_ids, numbers.media)
        hidden_states = self.model(hidden_states, inputs.positions, self.kv_cache, inputs.metadata, inputs.last_tokens)
        return hidden_states, inputs.sampling_rows

    def _embed(self, token_ids: Tensor, media: Items[MediaRows]) -> Tensor:
        """Token embeddings [n, hidden], with those of pictures in the rows of their pads."""
        hidden_states = self.model.embed(token_ids)
        for rows in media:
            embeddings = self.encoder_cache.get(rows.digest)
            hidden_states[rows.row : rows.row + rows.count] = embeddings[rows.start : rows.start + rows.count]
        return hidden_states

    def _draw(self, flight: Flight) -> None:
        """Choose the tokens, leave them for the next step, and begin to copy them to the host."""
        logits, best, places, rows = flight.logits, flight.best, flight.places, flight.rows
        if logits is None or best is None or places is None or rows is None:
            return
        masking = self.masks.start(flight.sampling) if flight.waits else flight.masking
        allowed: dict[int, Words] = {}
        if masking is not None:
            allowed = masking.gather()
            flight.errors.update(masking.errors)
        ruled = [i for i, entry in enumerate(flight.sampling) if not entry.seq.sampling.is_plain]
        drawn = self.sampler.draw(
            logits, best, [sampler_row(i, flight.sampling[i], int(places[i]), allowed.get(i)) for i in ruled]
        )
        if ruled:
            self.tables.remember(rows, drawn.tokens)
        flight.drawing = drawn.fetch()
        flight.logits = None

    def collect(self, flight: Flight) -> StepResult:
        """What the step found. Waits for the device."""
        if flight.drawing is None:
            return StepResult([0] * len(flight.batch.sampling), errors=flight.errors)
        tokens, logprobs = flight.drawing.wait()
        if FAILED in tokens:
            bad = (entry for entry, token in zip(flight.sampling, tokens, strict=True) if token == FAILED)
            flight.errors.update({entry.seq.request_id: NOT_FINITE for entry in bad})
        return result_of(flight, tokens, logprobs)


def healthy_part(batch: ScheduledBatch, failed: dict[bytes, str]) -> Flight:
    """`batch` without the sequences that need a picture of `failed` (digest -> reason) in this step."""
    if not failed:
        return Flight(batch, batch.seqs, batch.num_decodes)
    errors: dict[str, str] = {}
    for entry in batch.seqs:
        needed = (entry.seq.spans[i].digest for i in entry.seq.spans_in(entry.start, entry.num_tokens))
        reason = next((failed[digest] for digest in needed if digest in failed), None)
        if reason is not None:
            errors[entry.seq.request_id] = reason
    kept = [entry.seq.request_id not in errors for entry in batch.seqs]
    entries = [entry for entry, keep in zip(batch.seqs, kept, strict=True) if keep]
    return Flight(batch, entries, sum(kept[: batch.num_decodes]), errors)


def result_of(flight: Flight, tokens: list[int], logprobs: dict[int, TokenLogprob]) -> StepResult:
    """One token per sampling entry of the batch, in its order; those of failed requests are placeholders.

    `tokens` and `logprobs` (by place) are those of `flight.sampling`.
    """
    wanted = flight.batch.sampling
    if len(wanted) == len(tokens) and not logprobs:
        return StepResult(tokens, errors=flight.errors)
    places = {entry.seq.request_id: i for i, entry in enumerate(flight.sampling)}
    found = [places.get(entry.seq.request_id) for entry in wanted]
    return StepResult(
        token_ids=[0 if place is None else tokens[place] for place in found],
        logprobs=[None if place is None else logprobs.get(place) for place in found] if logprobs else [],
        errors=flight.errors,
    )


def sampler_row(index: int, entry: ScheduledSeq, line: int, allowed: Words | None) -> SamplerRow:
    """What the sampler needs to know of a sequence with rules; `index` is its place among those that sample."""
    seq, sampling = entry.seq, entry.seq.sampling
    position = entry.end - seq.num_prompt_tokens
    return SamplerRow(
        index=index,
        owner=seq,
        line=line,
        sampling=sampling.params,
        seed=sampling.seed,
        banned=() if allowed is not None else sampling.banned(position),  # see Masks
        token_ids=seq.token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_tokens=entry.end,
        allowed=allowed,
    )


def load_model(config: EngineConfig, device: torch.device, clock: StartClock) -> Qwen2VLForConditionalGeneration:
    """The network with its weights."""
    dtype = DTYPES[config.dtype]
    load_format = cast("LoadFormat", config.load_format)  # the options know no other words
    try_kernels_out(config, device)
    model = build_model(config.spec, dtype, device, config.quantization, config.attention_backend)
    clock.passed("kernels")
    logger.info("attention: %s", model.attention_reason)
    logger.info("attention in pictures: %s", model.vision_reason)
    logger.info("matrices: %s", model.linear_reason)
    load_weights(model, config.spec.folder, load_format)
    clock.passed("weights")
    return model


@torch.inference_mode()
def size_kv_cache(config: EngineConfig, model: Qwen2VLForConditionalGeneration) -> EngineConfig:
    """`config` with `num_blocks`: on a GPU from what is free once libraries are loaded, elsewhere resolved already."""
    if config.num_blocks is not None:
        return config
    warm_up(model, config.block_size)
    usable = usable_bytes(config, model.device)
    # Torch's own attention gathers contexts and may hold all scores of a chunk: that is measured.
    kernels = model.attention.graph_safe and torch.cuda.get_device_capability(model.device) >= (8, 0)
    bounded = kernels and model.dtype != torch.float32
    cost = None if bounded else measure_cost(model, config)
    return config.with_kv_memory(kv_cache_bytes(config, usable, cost, own_kernels(model)))


def own_kernels(model: Qwen2VLForConditionalGeneration) -> Own:
    return Own(tower=tower_kernel(model) is not None, joined=joins_gate_and_up(model))


def tower_kernel(model: Qwen2VLForConditionalGeneration) -> ModuleType | None:
    """Our own attention inside pictures, where it runs: it works in place, and reads on the device who sees whom."""
    return segment_kernel(model.device, model.compute_dtype, model.spec.vision.head_dim)
