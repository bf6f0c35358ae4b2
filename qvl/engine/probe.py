"""Small steps on a GPU, which cost what larger ones cost in proportion: for attention whose memory follows the lengths.

No worst case is ever run. Knows shapes and torch's memory counters. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qvl.engine.config import EngineConfig
from qvl.kernels.gpu import compiling_together
from qvl.kernels.pixels import pixel_kernels
from qvl.layers.attention import AttentionMetadata, KVCache, make_kv_cache
from qvl.models.preprocess import patchify
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.types import Grid

QUERY, CONTEXT, DECODES, SIDE = 64, 1024, 8, 32


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


def measure_cost(model: Qwen2VLForConditionalGeneration, config: EngineConfig) -> StepCost:
    """Peaks of five small steps on the GPU; their keys and values all go to one block, which nobody reads again."""
    dtype, device = model.dtype, model.device
    kv = make_kv_cache(config.spec.text, 1, config.block_size, dtype, device)

    def step(query_lens: Sequence[int], context: int) -> Callable[[], None]:
        return lambda: run_decoder(model, kv, query_lens, context, config.block_size)

    return fit_cost(
        alone=peak_bytes(step([QUERY], QUERY), device),
        behind=peak_bytes(step([QUERY], CONTEXT), device),
        wider=peak_bytes(step([2 * QUERY], CONTEXT), device),
        decode=peak_bytes(step([1] * DECODES, CONTEXT), device),
        picture=peak_bytes(lambda: run_vision(model), device),
    )


def warm_up(model: Qwen2VLForConditionalGeneration, block_size: int) -> None:
    """Load what libraries load on first use, and build what is built then: none of it is part of a step."""
    kv = make_kv_cache(model.spec.text, 1, block_size, model.dtype, model.device)

    def steps() -> None:
        run_decoder(model, kv, [QUERY], CONTEXT, block_size)
        run_decoder(model, kv, [1] * DECODES, CONTEXT, block_size)
        run_vision(model)

    if model.device.type == "cuda":
        pixel_kernels(model.spec.processor, model.compute_dtype)  # tried out first: in there nothing is computed
    with compiling_together():
        steps()
    steps()


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
    patches = patchify(pixels, side, side, processor, model.compute_dtype)
    model.encode_media(patches, [Grid(1, SIDE, SIDE)])
