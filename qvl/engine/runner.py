"""Owns the model, its KV cache and the sampler, and carries out one scheduled step.

Knows devices and tensors. Decides nothing: which tokens, which blocks and which pictures is the scheduler's word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from qvl.engine.batch import ScheduledBatch, ScheduledSeq, StepResult
from qvl.engine.config import EngineConfig
from qvl.engine.device import DTYPES, is_out_of_memory, release_cached_memory
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.inputs import BlockTables, StepInputs, build_inputs
from qvl.engine.masks import Masks
from qvl.engine.memory import kv_cache_bytes, measure_cost, usable_bytes
from qvl.engine.sampler import SampledToken, Sampler, SamplerRow
from qvl.engine.vision import MediaEncoder
from qvl.layers.attention import KVCache, make_kv_cache
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.models.registry import build_model
from qvl.models.weights import LoadFormat, load_weights

NOT_FINITE = (
    "the model's scores for this request are not finite numbers (an overflow of the number format); "
    "a wider dtype, bfloat16 or float32, is the remedy"
)
STEP_OUT_OF_MEMORY = (
    "out of memory while computing this request; lower gpu_memory_utilization or max_num_batched_tokens"
)


class ModelRunner:
    """Loads the model of `config` onto its device and runs steps; `config` has its `num_blocks` afterwards.

    Raises `CheckpointError` and `ConfigError` (a given max_model_len does not fit into the memory that is left).
    """

    def __init__(self, config: EngineConfig) -> None:
        torch.set_num_threads(config.num_threads)
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
        )
        self.model = load_model(config, self.device)
        self.config = size_kv_cache(config, self.model)
        assert self.config.num_blocks is not None
        self.kv_cache: KVCache = make_kv_cache(
            config.spec.text, self.config.num_blocks, config.block_size, self.model.dtype, self.device
        )
        self.block_tables = BlockTables()
        self.encoder_cache: EncoderCache[Tensor] = EncoderCache(config.encoder_cache_bytes)
        self.encoder = MediaEncoder(self.model, self.encoder_cache, config.spec.processor)
        ids = config.spec.ids
        self.sampler = Sampler(config.spec.text.vocab_size, never_sampled=ids.never_sampled, device=self.device)
        self.masks = Masks(config.spec.text.vocab_size, ends=ids.eos, never=ids.never_sampled)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepResult:
        """Encode the step's pictures, compute its tokens, sample. What goes wrong for one request is in `errors`."""
        failed = self.encoder.encode(batch.encode)
        step = healthy_part(batch, failed)
        sampled: dict[str, SampledToken] = {}
        if step.entries:
            try:
                sampled = self._compute(step)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                release_cached_memory(self.device)
                step.errors.update({entry.seq.request_id: STEP_OUT_OF_MEMORY for entry in step.entries})
        return result_of(batch, sampled, step.errors)

    def _compute(self, step: _Step) -> dict[str, SampledToken]:
        """Forward pass and sampling: the token of every entry that samples, by request."""
        sampling = [entry for entry in step.entries if entry.samples]
        masking = self.masks.start(sampling)
        inputs = build_inputs(step.entries, step.num_decodes, self.config.block_size, self.device, self.block_tables)
        hidden_states = self._embed(inputs)
        hidden_states = self.model(hidden_states, inputs.positions, self.kv_cache, inputs.metadata)
        if not sampling:
            return {}
        logits = self.model.logits(hidden_states[inputs.last_rows])
        mask = None if masking is None else masking.gather()
        tokens = self.sampler.sample(logits, [sampler_row(entry) for entry in sampling], mask)
        for entry, token in zip(sampling, tokens, strict=True):
            if token.failed:
                step.errors[entry.seq.request_id] = NOT_FINITE
        if masking is not None:
            step.errors.update(masking.errors)
        return {entry.seq.request_id: token for entry, token in zip(sampling, tokens, strict=True)}

    def _embed(self, inputs: StepInputs) -> Tensor:
        """Token embeddings [n, hidden], with those of pictures in the rows of their pads."""
        hidden_states = self.model.embed(inputs.token_ids)
        for rows in inputs.media:
            embeddings = self.encoder_cache.get(rows.digest)
            hidden_states[rows.row : rows.row + rows.count] = embeddings[rows.start : rows.start + rows.count]
        return hidden_states


@dataclass(slots=True)
class _Step:
    """The entries of a batch that can be computed, and why the others cannot."""

    entries: Sequence[ScheduledSeq]
    num_decodes: int
    errors: dict[str, str] = field(default_factory=dict)


def healthy_part(batch: ScheduledBatch, failed: dict[bytes, str]) -> _Step:
    """`batch` without the sequences that need a picture of `failed` (digest -> reason) in this step."""
    if not failed:
        return _Step(batch.seqs, batch.num_decodes)
    errors: dict[str, str] = {}
    for entry in batch.seqs:
        needed = (entry.seq.spans[i].digest for i in entry.seq.spans_in(entry.start, entry.num_tokens))
        reason = next((failed[digest] for digest in needed if digest in failed), None)
        if reason is not None:
            errors[entry.seq.request_id] = reason
    kept = [entry.seq.request_id not in errors for entry in batch.seqs]
    entries = [entry for entry, keep in zip(batch.seqs, kept, strict=True) if keep]
    return _Step(entries, sum(kept[: batch.num_decodes]), errors)


def result_of(batch: ScheduledBatch, sampled: dict[str, SampledToken], errors: dict[str, str]) -> StepResult:
    """One token per sampling entry of `batch`, in its order; those of failed requests are placeholders."""
    missing = SampledToken(0)
    tokens = [sampled.get(entry.seq.request_id, missing) for entry in batch.sampling]
    asked = any(token.logprob is not None for token in tokens)
    return StepResult(
        token_ids=[token.token_id for token in tokens],
        logprobs=[token.logprob for token in tokens] if asked else [],
        errors=errors,
    )


def sampler_row(entry: ScheduledSeq) -> SamplerRow:
    """What the sampler needs to know of a sequence."""
    seq = entry.seq
    return SamplerRow(
        owner=seq,
        sampling=seq.sampling.params,
        seed=seq.sampling.seed,
        banned=() if seq.grammar is not None else seq.sampling.banned(seq.num_output),  # see Masks
        token_ids=seq.token_ids,
        num_prompt_tokens=seq.num_prompt_tokens,
    )


def load_model(config: EngineConfig, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The network with its weights."""
    dtype = DTYPES[config.dtype]
    load_format = cast("LoadFormat", config.load_format)  # the options know no other words
    model = build_model(config.spec, dtype, device, config.quantization)
    load_weights(model, config.spec.folder, device=device, dtype=dtype, load_format=load_format)
    return model


@torch.inference_mode()
def size_kv_cache(config: EngineConfig, model: Qwen2VLForConditionalGeneration) -> EngineConfig:
    """`config` with `num_blocks`: on a GPU from what is free and from measured steps, elsewhere resolved already."""
    if config.num_blocks is not None:
        return config
    cost = measure_cost(model, config)
    return config.with_kv_memory(kv_cache_bytes(config, cost, usable_bytes(config, model.device)))
