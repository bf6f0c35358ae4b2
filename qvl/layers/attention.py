"""The attention seam: what a step tells the layers about its sequences, and the paged cache.

Knows shapes and the interface of a paged attention. Does not know requests, nor which implementation runs:
`qvl.kernels` chooses one per device.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.specs import TextSpec

TILE_FIELDS = 4  # int32 of a tile of a prompt: sequence, its first token in the step, tokens, context before them


class KVCache(list[tuple[Tensor, Tensor]]):
    """One (k, v) pair per layer, each [num_blocks, block_size, num_kv_heads, head_dim].

    `pieces` are the same memory in as few tensors as hold it, [..., num_blocks, block_size, num_kv_heads, head_dim].
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]], pieces: Sequence[Tensor]) -> None:
        super().__init__(pairs)
        self.pieces = pieces

    def copy_block(self, source: int, target: int) -> None:
        """Keys and values of every layer from one block to another, in the order of the device's other work."""
        for piece in self.pieces:
            piece[..., target, :, :, :].copy_(piece[..., source, :, :, :])


@dataclass(slots=True)
class AttentionMetadata:
    """One step's sequences; the first `num_decodes` of them have exactly one query token.

    Tensors live on the device of the model, the lists are host copies of the same numbers, so that no layer has to
    wait for the device to learn a length.
    """

    seq_lens: Tensor  # int32 [b], context including this step's tokens
    block_table: Tensor  # int32 [b, max_blocks], entries past a sequence's last block may hold any valid block
    slot_mapping: Tensor  # int64 [n], block * block_size + offset of every token of this step
    query_lens: list[int]
    context_lens: list[int]
    block_size: int
    num_decodes: int
    prompt_tiles: Tensor | None = None  # int32 [t, TILE_FIELDS] for all that is no decode, in a step that is recorded


@dataclass(frozen=True, slots=True)
class Heads:
    """What a paged attention must know of a decoder (of this rank's share of it)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads


class PagedAttention(Protocol):
    """Causal grouped-query attention over a paged cache. `plan` runs once per step, `run` once per layer."""

    name: str
    graph_safe: bool  # a step of decodes may be recorded once and replayed with other lengths
    takes_sums: bool  # `run` takes a product that it finishes itself
    tile_tokens: int  # tokens of a prompt that are attended together; 0: a step with prompts cannot be recorded

    def plan(self, metadata: AttentionMetadata) -> Any:
        """Whatever `run` needs that is the same in every layer."""

    def run(self, qkv: Any, angles: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], plan: Any) -> Tensor:
        """Turn q and k by their angles (fp32 cos and sin [n, 1, head_dim]), store k and v, attend.

        qkv [n, (heads + 2 * kv_heads) * head_dim]: [n, heads * head_dim]. A slot of -1 stores nothing; the result of a
        sequence of length 0 is anything finite. (Both only where `graph_safe`.)
        """


def cut_prompts(
    query_lens: Sequence[int], context_lens: Sequence[int], num_decodes: int, tokens: int
) -> npt.NDArray[np.int32]:
    """Tiles of at most `tokens` tokens of a sequence, of all but the decodes; those of many keys first: none of them
    shall run last."""
    found = [np.empty((0, TILE_FIELDS), dtype=np.int32)]
    row = num_decodes
    for seq in range(num_decodes, len(query_lens)):
        count = query_lens[seq]
        at = np.arange(0, count, tokens, dtype=np.int32)
        tiles = np.empty((len(at), TILE_FIELDS), dtype=np.int32)
        tiles[:, 0], tiles[:, 1], tiles[:, 2] = seq, row + at, np.minimum(tokens, count - at)
        tiles[:, 3] = context_lens[seq] - count + at
        found.append(tiles)
        row += count
    together = np.concatenate(found)
    return np.ascontiguousarray(together[np.argsort(-together[:, 2:].sum(1), kind="stable")])


def make_kv_cache(
    spec: TextSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device | str
) -> KVCache:
    """Of `num_blocks` zeroed blocks."""
    shape = (num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
    if torch.device(device).type == "cpu":
        pairs = [(_zeros_on_demand(shape, dtype), _zeros_on_demand(shape, dtype)) for _ in range(spec.num_layers)]
        return KVCache(pairs, [tensor for pair in pairs for tensor in pair])
    # One piece: torch would round every single tensor up to 2 MiB, beside what was counted for the cache.
    together = torch.zeros((spec.num_layers, 2, *shape), dtype=dtype, device=device)
    return KVCache(((pair[0], pair[1]) for pair in together), [together])


def _zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.zeros` on a CPU, from pages that the kernel fills when they are first used: gigabytes cost no start-up
    time, and blocks that are never used no memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(1, num_bytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape)).view(shape)
