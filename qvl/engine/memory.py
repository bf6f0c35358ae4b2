"""How much of a GPU the KV cache may take: what is free after loading, less what everything else will need.

    total |<----------------------- gpu_memory_utilization ----------------------->|
          | others, context, weights | KV cache | encoder cache | kept | work |

`work` is the largest of what a step's parts hold at a time, by arithmetic from the shapes; `kept` is what graphs and
the sampler hold for good. No worst case is ever run, so that start-up takes milliseconds and cannot itself run out of
memory. docs/performance.md has the sum for the 7B. Knows shapes and torch's memory counters. Does not know requests.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from qvl.engine.config import DTYPE_BYTES, EngineConfig
from qvl.engine.probe import StepCost
from qvl.engine.prompt_graphs import MOST_NARROW, most_tokens, num_wide
from qvl.engine.sampler import ROWS_AT_ONCE
from qvl.engine.tower_graphs import MOST_GRAPHS, MOST_PATCHES
from qvl.engine.vision import MAX_BATCH_PATCHES
from qvl.models.qwen2_vl import MLP_ROWS
from qvl.models.vision import LARGE, attention_bytes, mlp_rows

logger = logging.getLogger("qvl.engine")

SLACK = 1.05  # rounding of allocations, and what is small
# Bytes for each score of those rows that are sampled at a time, in the dearest way, a full sort: scores twice, sorted
# scores, ids in 64 and in 32 bits, filtered scores, probabilities, noise with its bits.
SORTED_BYTES = 40
# What is there after the cache has been sized: outside of torch's memory 47 CUDA graphs (50 MiB on an H200), inside
# what the sampler's passes leave for each other (9), and what rounding takes.
LIBRARIES = 70 << 20
GRAPH_BYTES = 5 << 18  # of each graph of 300 kernels that comes beside those 47
LEFT_SUMS = 10 << 20  # what blocks of attention in large pictures leave for each other: 131 times 12 warps' 5.9 KB


@dataclass(frozen=True, slots=True)
class Own:
    """Kernels of ours that run: attention inside pictures, which works in place, so that towers are recorded; gate, up
    and their product in one, so that wider steps are.
    """

    tower: bool = False
    joined: bool = False


NONE = Own()


def kv_cache_bytes(config: EngineConfig, usable: int, cost: StepCost | None = None, own: Own = NONE) -> int:
    """Bytes for keys and values out of `usable`, what is left for everything that is not there yet; 0: nothing fits.

    `cost` was measured where the memory of attention follows the lengths.
    """
    work, kept, encoded = work_bytes(config, cost, own.tower), kept_bytes(config, own), config.encoder_cache_bytes
    per_token = config.block_bytes / config.block_size
    # Every token in the cache may be read by one decode step, which costs its share beside its own keys and values.
    beside = 0.0 if cost is None else cost.decode_context * SLACK
    # A tiny model would get millions of blocks that all its requests together cannot fill.
    most = config.max_num_seqs * -(-config.max_model_len // config.block_size) * config.block_bytes
    found = min(most, max(0, int((usable - work - kept - encoded) * per_token / (per_token + beside))))
    logger.info(
        "of %d MiB that are left for it: keys and values %d, the largest step %d, kept %d, encoded pictures %d",
        *(part >> 20 for part in (usable, found, work, kept, encoded)),
    )
    return found


def work_bytes(config: EngineConfig, cost: StepCost | None, tower_in_place: bool) -> int:
    """The largest of what the parts of a step hold at a time."""
    decoder, patches = decoder_bytes(config), largest_patches(config)
    # One of LARGE patches goes in larger parts than a larger one.
    vision = max(vision_bytes(config, number, tower_in_place) for number in (patches, min(patches, LARGE)))
    if cost is not None:
        decoder = max(decoder, int(cost.prefill(config.max_num_batched_tokens, config.max_model_len)))
        vision = int(cost.patch * patches)
    return int(max(decoder, sampling_bytes(config), vision) * SLACK)


def decoder_bytes(config: EngineConfig, num_tokens: int | None = None, joined: bool = False) -> int:
    """Activations of a forward pass over `num_tokens` tokens (of a full step): the residual stream, what the layer
    before added and the angles, beside the larger of attention and what follows it. `joined`: gate and up take none.
    """
    text, size = config.spec.text, DTYPE_BYTES[config.dtype]
    tokens = config.max_num_batched_tokens if num_tokens is None else num_tokens
    heads, kv_heads = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    always = 2 * text.hidden_size * size + 2 * text.head_dim * 4
    attention = (text.hidden_size + (heads + 2 * kv_heads) + 2 * heads) * size  # normed; q, k, v; turned q; the result
    # The result, which lies where the heads were if it is as wide.
    rest = (heads if heads == text.hidden_size else heads + text.hidden_size) * size
    # What attention adds, normed, the result; gate and up, and their product.
    part = min(tokens, MLP_ROWS) * (3 * text.hidden_size + (1 if joined else 3) * text.intermediate_size) * size
    return tokens * always + max(tokens * attention, tokens * rest + part)


def sampling_bytes(config: EngineConfig) -> int:
    """Behind a forward pass: its result and the logits of every sequence, and what choosing a part of them takes."""
    text, size, seqs = config.spec.text, DTYPE_BYTES[config.dtype], config.max_num_seqs
    return seqs * (text.hidden_size + text.vocab_size) * size + min(ROWS_AT_ONCE, seqs) * text.vocab_size * SORTED_BYTES


def vision_bytes(config: EngineConfig, patches: int, in_place: bool = False) -> int:
    """Activations of the vision tower over `patches` patches: while they are embedded, with what went in, and in two
    copies if they are several pictures'; in a block, with a norm of the stream, beside the larger of some heads (q, k,
    v, their result unless it is put `in_place` of q, and rows that are normed again) and a part of the MLP; in the
    merger, with its result.
    """
    vision, size = config.spec.vision, DTYPE_BYTES[config.dtype]
    stream = patches * vision.embed_dim * size
    angles = patches * 2 * vision.head_dim * 4
    rows = min(patches, mlp_rows(patches))
    one_head = 3 * vision.head_dim * patches * size
    most = min(attention_bytes(patches), vision.num_heads * one_head)
    heads = max(one_head, most) * (3 if in_place else 4) // 3 + rows * vision.embed_dim * size
    mlp = rows * (vision.mlp_dim + 2 * vision.embed_dim) * size
    block = stream + max(heads, mlp)
    merger = ((patches // vision.merge_size**2) * vision.hidden_size + rows * 4 * vision.embed_dim) * size
    embedding = patches * vision.patch_dim * size + (stream if patches <= MAX_BATCH_PATCHES else 0)
    return stream + max(angles + max(embedding, block), merger)


def kept_bytes(config: EngineConfig, own: Own = NONE) -> int:
    """What is there for good: tables, counts of tokens, the memory of the graphs and what goes into them, libraries."""
    text, size, rows = config.spec.text, DTYPE_BYTES[config.dtype], config.max_num_seqs
    tables = rows * -(-config.max_model_len // config.block_size) * 4
    counts = rows * text.vocab_size * 2
    prompts = most_tokens(config, own.joined) * text.hidden_size * size
    patches = MOST_PATCHES * config.spec.vision.patch_dim * size + LEFT_SUMS if own.tower else 0
    outside = (own.tower * MOST_GRAPHS + num_wide(config, own.joined)) * GRAPH_BYTES + LIBRARIES
    return 2 * tables + counts + prompts + patches + graph_bytes(config, own) + outside


def graph_bytes(config: EngineConfig, own: Own = NONE) -> int:
    """What all graphs share: a step with as many decodes as run together and its logits, the widest with prompts, or
    the largest of pictures.
    """
    rows = config.max_num_seqs
    logits = rows * config.spec.text.vocab_size * DTYPE_BYTES[config.dtype]
    most = most_tokens(config, own.joined)
    steps = [decoder_bytes(config, rows) + logits, decoder_bytes(config, most, own.joined)]
    if own.joined:  # which few rows are not
        steps.append(decoder_bytes(config, min(most, MOST_NARROW)))
    return max(*steps, vision_bytes(config, MOST_PATCHES, in_place=True) if own.tower else 0)


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
