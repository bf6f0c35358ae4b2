"""The vision tower of Qwen2-VL: patches in, tokens of the decoder's width out.

Knows its weights and that every temporal slice of every picture attends to itself only. Many patches go through in
parts: the widest activations of 65,536 would take gigabytes. Does not know pixels, requests or caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qvl.kernels.gpu import capability_of
from qvl.kernels.linear import quick_gelu_linear
from qvl.kernels.segments import Segments, preferred_order, segment_attention
from qvl.layers.activation import ACTIVATIONS
from qvl.layers.linear import Linear
from qvl.layers.norm import LayerNorm
from qvl.layers.rotary import vision_angles, vision_positions
from qvl.specs import VisionSpec
from qvl.types import Grid

LAYER_NORM_EPS = 1e-6
MLP_ROWS = 8192  # patches that go through an MLP at a time
PART_ROWS = 128  # and such a part is a multiple of this: what a product computes at a time, and whole tokens
ATTENTION_BYTES = 128 << 20  # what queries, keys and values of all patches may take at a time, of as many heads as fit
LARGE = 1 << 15  # with more patches both are half of that: attention takes so long that smaller parts go unnoticed


class VisionAttention(nn.Module):
    """Full attention inside each segment, behind a norm."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        self.head_dim = spec.head_dim
        width = spec.embed_dim
        self.qkv = Linear(width, 3 * width, bias=True, dtype=dtype, compute_dtype=compute_dtype)
        self.proj = Linear(width, width, bias=True, dtype=dtype, compute_dtype=compute_dtype)

    def forward(
        self, hidden_states: Tensor, norm: LayerNorm, normed: Tensor, angles: tuple[Tensor, Tensor], segments: Segments
    ) -> Tensor:
        """What `proj` takes: [patches, embed_dim]. `normed` is norm(hidden_states) and may be overwritten."""
        each = self.heads_at_once(hidden_states)
        if each == self.num_heads:
            return segment_attention(self.qkv(normed).unflatten(1, (3, each, -1)), angles, segments)
        for first in range(0, self.num_heads, each):
            columns = slice(first * self.head_dim, (first + each) * self.head_dim)
            # In one expression: under a name, these heads would still be there while the next ones are computed.
            normed[:, columns] = segment_attention(self.some_heads(hidden_states, norm, first, each), angles, segments)
        return normed

    def some_heads(self, hidden_states: Tensor, norm: LayerNorm, first: int, count: int) -> Tensor:
        """Queries, keys and values of heads [first, first + count): [patches, 3, count, head_dim]."""
        qkv = hidden_states.new_empty(len(hidden_states), 3, count, self.head_dim)
        for rows in chunks(len(hidden_states), mlp_rows(len(hidden_states))):
            normed = norm(hidden_states[rows])
            for i in range(3):
                start = (i * self.num_heads + first) * self.head_dim
                part = self.qkv.part(normed, slice(start, start + count * self.head_dim))
                qkv[rows, i] = part.unflatten(1, (count, -1))
        return qkv

    def heads_at_once(self, hidden_states: Tensor) -> int:
        """All of them, or the most that divide them evenly, are a part of `qkv` and stay below `attention_bytes`."""
        rows = self.qkv.part_rows
        if rows is None:
            return self.num_heads
        one = 3 * self.head_dim * len(hidden_states) * hidden_states.element_size()
        most = attention_bytes(len(hidden_states))
        even = [n for n in range(1, self.num_heads) if self.num_heads % n == 0 and n * self.head_dim % rows == 0]
        even.append(self.num_heads)
        return max((n for n in even if n * one <= most), default=even[0])


def attention_bytes(patches: int) -> int:
    """For queries, keys and values, if one head's do not take more."""
    return ATTENTION_BYTES if patches <= LARGE else ATTENTION_BYTES // 2


def mlp_rows(patches: int) -> int:
    """So many of them go through an MLP at a time."""
    return MLP_ROWS if patches <= LARGE else MLP_ROWS // 2


def chunks(rows: int, most: int) -> Iterator[slice]:
    """At most `most` at a time, in parts of one size: a few rows alone cost a product as much as many."""
    unit = min(PART_ROWS, most)
    parts = max(1, -(-rows // most))
    size = max(1, -(-rows // (parts * unit))) * unit
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


class VisionMLP(nn.Module):
    """Two layers with the activation that the configuration names."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.hidden_act = spec.hidden_act
        self.fc1 = Linear(spec.embed_dim, spec.mlp_dim, bias=True, dtype=dtype, compute_dtype=compute_dtype)
        self.fc2 = Linear(spec.mlp_dim, spec.embed_dim, bias=True, dtype=dtype, compute_dtype=compute_dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.hidden_act == "quick_gelu" and self.fc1.weight is None:
            return self.fc2.of_quick_gelu(self.fc1(hidden_states))
        return self.fc2(self.activated(hidden_states))

    def activated(self, hidden_states: Tensor) -> Tensor:  # [n, embed_dim] -> [n, mlp_dim]
        weight, bias = self.fc1.weight, self.fc1.bias
        if self.hidden_act == "quick_gelu" and weight is not None and bias is not None:
            return quick_gelu_linear(hidden_states, weight, bias)
        return ACTIVATIONS[self.hidden_act](self.fc1(hidden_states))


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to what went in."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.embed_dim, LAYER_NORM_EPS, compute_dtype)
        self.norm2 = LayerNorm(spec.embed_dim, LAYER_NORM_EPS, compute_dtype)
        self.attn = VisionAttention(spec, dtype, compute_dtype)
        self.mlp = VisionMLP(spec, dtype, compute_dtype)

    def forward(
        self,
        hidden_states: Tensor,
        normed: Tensor,
        following: LayerNorm,
        angles: tuple[Tensor, Tensor],
        segments: Segments,
    ) -> None:
        """Adds to hidden_states in place. `normed` comes as this block's norm of it, and leaves as the following's."""
        heads = self.attn(hidden_states, self.norm1, normed, angles, segments)
        parts = list(chunks(len(heads), mlp_rows(len(heads))))
        for rows in parts:
            part = hidden_states[rows]
            added = self.attn.proj(heads[rows])
            if rows is parts[-1]:
                del heads  # the queries, keys and values of all patches may lie there
            between = self.norm2(part, added)
            del added
            following(part, self.mlp(between), out=normed[rows])


class PatchEmbed(nn.Module):
    """The reference's 3-D convolution: its kernel equals its stride, so it is one matrix over flattened patches."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.proj = Linear(spec.patch_dim, spec.embed_dim, bias=False, dtype=dtype, compute_dtype=compute_dtype)

    def forward(self, patches: Tensor) -> Tensor:  # [patches, patch_dim] -> [patches, embed_dim]
        return self.proj(patches)


class PatchMerger(nn.Module):
    """merge_size x merge_size neighbouring patches, side by side in the input, become one token."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.merged_dim = spec.merged_dim
        self.ln_q = LayerNorm(spec.embed_dim, LAYER_NORM_EPS, compute_dtype)
        self.mlp = nn.Sequential(
            Linear(self.merged_dim, self.merged_dim, bias=True, dtype=dtype, compute_dtype=compute_dtype),
            nn.GELU(),
            Linear(self.merged_dim, spec.hidden_size, bias=True, dtype=dtype, compute_dtype=compute_dtype),
        )

    def forward(self, normed: Tensor) -> Tensor:  # [patches, embed_dim], behind ln_q -> [tokens, hidden_size]
        return self.mlp(normed.view(-1, self.merged_dim))


class VisionTower(nn.Module):
    """Pictures and videos of one step, one after the other, in one batch of patches."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.dtype, self.compute_dtype = dtype, compute_dtype
        self.patch_embed = PatchEmbed(spec, dtype, compute_dtype)
        self.blocks = nn.ModuleList(VisionBlock(spec, dtype, compute_dtype) for _ in range(spec.depth))
        self.merger = PatchMerger(spec, dtype, compute_dtype)

    def forward(self, pixel_values: Tensor | list[Tensor], grids: Sequence[Grid]) -> Tensor:
        """[patches, patch_dim] in patch order, sum of the grids' patches: [tokens, hidden_size].

        A list of parts is emptied on the way, so that their memory is free before the blocks need it.
        """
        spec = self.spec
        parts = pixel_values if isinstance(pixel_values, list) else [pixel_values]
        device = parts[0].device
        segments = Segments.of(segment_lengths(grids), device, self.compute_dtype, spec.head_dim, self.dtype)
        positions = torch.from_numpy(vision_positions(grids, spec.merge_size))
        if device.type == "cuda":
            positions = positions.pin_memory().to(device, non_blocking=True)
        return self.compute(parts, positions, segments)

    def compute(self, parts: list[Tensor], positions: Tensor, segments: Segments) -> Tensor:
        """The same, with the row and column of each patch, fp32 [patches, 2]: all of it on the device."""
        spec, dtype = self.spec, self.compute_dtype
        angles = vision_angles(positions, spec.head_dim)
        embedded = []
        while parts:
            embedded.append(self.patch_embed(parts.pop(0).to(dtype)))
        hidden_states = joined(embedded)
        norms: list[Any] = [*(block.norm1 for block in self.blocks), self.merger.ln_q]
        normed = norms[0](hidden_states)
        with preferred_order(dtype, capability_of(positions.device)):
            for block, norm in zip(self.blocks, norms[1:], strict=True):
                block(hidden_states, normed, norm, angles, segments)
        del hidden_states, angles
        area = spec.merge_size**2
        tokens = normed.new_empty(len(normed) // area, spec.hidden_size)
        for rows in chunks(len(normed), mlp_rows(len(normed))):
            tokens[rows.start // area : rows.stop // area] = self.merger(normed[rows])
        return tokens


def segment_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of every temporal slice."""
    return [grid.h * grid.w for grid in grids for _ in range(grid.t)]


def joined(parts: list[Tensor]) -> Tensor:
    """One tensor, without a copy where it is one already; the list is emptied."""
    together = parts[0] if len(parts) == 1 else torch.cat(parts)
    parts.clear()
    return together
