"""How much of a GPU the KV cache may take: what is free after loading, less what the largest step will need.

    total |<----------------- gpu_memory_utilization ------------------>|
          | others, context, weights | KV cache | encoder cache | work |

The work is measured on a few small steps and scaled by arithmetic; no worst case is ever run, so that start-up takes
milliseconds and cannot itself run out of memory. Knows shapes and torch's memory counters. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qvl.engine.config import EngineConfig
from qvl.engine.vision import MAX_BATCH_PATCHES
from qvl.layers.attention import AttentionMetadata, KVCache, make_kv_cache
from qvl.models.preprocess import patchify
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.types import Grid

QUERY, CONTEXT, DECODES, SIDE = 64, 1024, 8, 32
# float32 copies of the logits that a step with every sampling rule holds at once: scores, sorted, ids, noise, its bits.
LOGIT_COPIES = 6
SLACK = 1.1  # fragmentation


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes of activations: per token of a step, per token of context, per pair of both; per context token of a
    decode; per patch of a picture.
    """

    token: float
    context: float
    pair: float
    decode_context: float
    patch: float

    def prefill(self, num_tokens: int, context: int) -> float:
        return self.token * num_tokens + self.context * context + self.pair * num_tokens * context


def fit_cost(alone: int, behind: int, wider: int, decode: int, picture: int) -> StepCost:
    """Solve for the five rates from five peaks in bytes.

    `alone`: QUERY tokens with nothing before them; `behind`: the same at the end of CONTEXT tokens; `wider`: 2 x QUERY
    tokens there; `decode`: DECODES single tokens at the end of CONTEXT each; `picture`: SIDE x SIDE patches.
    """
    token = alone / QUERY
    pair = max(0.0, (wider - behind) / QUERY - token) / CONTEXT
    context = max(0.0, behind - token * QUERY - pair * QUERY * CONTEXT) / CONTEXT
    decode_context = max(0.0, decode - token * DECODES) / (DECODES * CONTEXT)
    return StepCost(token, context, pair, decode_context, picture / SIDE**2)


def kv_cache_bytes(config: EngineConfig, cost: StepCost, usable: int) -> int:
    """Bytes for keys and values out of `usable`, what is left for everything that is not there yet; 0: nothing fits."""
    logits = LOGIT_COPIES * 4 * config.spec.text.vocab_size * config.max_num_seqs
    decoder = cost.prefill(config.max_num_batched_tokens, config.max_model_len) + logits
    work = max(decoder, cost.patch * largest_patches(config)) * SLACK
    # Every token in the cache may be read by one decode step, which costs its share beside its own keys and values.
    per_token = config.block_bytes / config.block_size
    room = usable - work - config.encoder_cache_bytes
    # A tiny model would get millions of blocks that all its requests together cannot fill.
    most = config.max_num_seqs * -(-config.max_model_len // config.block_size) * config.block_bytes
    return min(most, max(0, int(room * per_token / (per_token + cost.decode_context * SLACK))))


def largest_patches(config: EngineConfig) -> int:
    """Patches of the largest batch of the vision tower: a full one, or one picture that fills the context."""
    merge = config.spec.vision.merge_size**2
    area = config.limits.max_pixels or config.spec.processor.max_pixels
    one = min(area // config.spec.vision.patch_size**2, config.max_model_len * merge)
    return max(min(MAX_BATCH_PATCHES, config.encoder_budget_tokens * merge), one)


def usable_bytes(config: EngineConfig, device: torch.device) -> int:
    """What `gpu_memory_utilization` leaves of the GPU beside everything that is on it now."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free)


def measure_cost(model: Qwen2VLForConditionalGeneration, config: EngineConfig) -> StepCost:
    """Peaks of five small steps on the GPU; their keys and values all go to one block, which nobody reads again."""
    dtype, device = model.dtype, model.device
    kv = make_kv_cache(config.spec.text, 1, config.block_size, dtype, device)

    def step(query_lens: Sequence[int], context: int) -> Callable[[], None]:
        return lambda: run_decoder(model, kv, query_lens, context, config.block_size)

    # Libraries allocate their workspaces on first use: those are not part of a step.
    for warm_up in (step([QUERY], CONTEXT), step([1] * DECODES, CONTEXT), lambda: run_vision(model)):
        warm_up()
    return fit_cost(
        alone=peak_bytes(step([QUERY], QUERY), device),
        behind=peak_bytes(step([QUERY], CONTEXT), device),
        wider=peak_bytes(step([2 * QUERY], CONTEXT), device),
        decode=peak_bytes(step([1] * DECODES, CONTEXT), device),
        picture=peak_bytes(lambda: run_vision(model), device),
    )


def peak_bytes(action: Callable[[], None], device: torch.device) -> int:
    """Memory that `action` takes at its peak, above what was allocated before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def run_decoder(
    model: Qwen2VLForConditionalGeneration, kv: KVCache, query_lens: Sequence[int], context: int, block_size: int
) -> None:
    """A step of sequences with these queries at the end of `context` tokens each, all of them in block 0."""
    device, total, count = model.device, sum(query_lens), len(query_lens)
    is_decode = all(length == 1 for length in query_lens)
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, *query_lens], device=device).cumsum(0).to(torch.int32),
        seq_lens=torch.full((count,), context, dtype=torch.int32, device=device),
        block_table=torch.zeros((count, -(-context // block_size)), dtype=torch.int32, device=device),
        slot_mapping=torch.arange(total, device=device) % block_size,
        query_lens=list(query_lens),
        context_lens=[context] * count,
        block_size=block_size,
        num_decodes=count if is_decode else 0,
    )
    positions = torch.arange(total, device=device).expand(3, -1)
    hidden_states = model.embed(torch.zeros(total, dtype=torch.int64, device=device))
    model(hidden_states, positions, kv, metadata)


def run_vision(model: Qwen2VLForConditionalGeneration) -> None:
    """One grey picture of SIDE x SIDE patches, from pixels on."""
    processor = model.spec.processor
    side = SIDE * processor.patch_size
    pixels = torch.full((1, side, side, 3), 128, dtype=torch.uint8, device=model.device)
    model.encode_media(patchify(pixels, side, side, processor), [Grid(1, SIDE, SIDE)])
