"""The vision tower of Qwen2-VL: patches in, tokens of the decoder's width out.

Knows its weights and that every temporal slice of every picture attends to itself only. Does not know pixels,
requests or caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvl.kernels.fused import rotate
from qvl.layers.activation import ACTIVATIONS
from qvl.layers.attention import segment_attention
from qvl.layers.linear import Linear
from qvl.layers.norm import LayerNorm
from qvl.layers.rotary import vision_angles
from qvl.specs import VisionSpec
from qvl.types import Grid

LAYER_NORM_EPS = 1e-6


class VisionAttention(nn.Module):
    """Full attention inside each segment."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = spec.num_heads
        width = spec.embed_dim
        self.qkv = Linear(width, 3 * width, bias=True, dtype=dtype, compute_dtype=compute_dtype)
        self.proj = Linear(width, width, bias=True, dtype=dtype, compute_dtype=compute_dtype)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = self.qkv(hidden_states).unflatten(1, (3, self.num_heads, -1)).unbind(1)
        return self.proj(segment_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, lengths))


class VisionMLP(nn.Module):
    """Two layers with the activation that the configuration names."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.act = ACTIVATIONS[spec.hidden_act]
        self.fc1 = Linear(spec.embed_dim, spec.mlp_dim, bias=True, dtype=dtype, compute_dtype=compute_dtype)
        self.fc2 = Linear(spec.mlp_dim, spec.embed_dim, bias=True, dtype=dtype, compute_dtype=compute_dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class VisionBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to what went in."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = LayerNorm(spec.embed_dim, LAYER_NORM_EPS, compute_dtype)
        self.norm2 = LayerNorm(spec.embed_dim, LAYER_NORM_EPS, compute_dtype)
        self.attn = VisionAttention(spec, dtype, compute_dtype)
        self.mlp = VisionMLP(spec, dtype, compute_dtype)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), cos, sin, lengths)
        return hidden_states + self.mlp(self.norm2(hidden_states))


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

    def forward(self, hidden_states: Tensor) -> Tensor:  # [patches, embed_dim] -> [tokens, hidden_size]
        return self.mlp(self.ln_q(hidden_states).view(-1, self.merged_dim))


class VisionTower(nn.Module):
    """Pictures and videos of one step, one after the other, in one batch of patches."""

    def __init__(self, spec: VisionSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.spec = spec
        self.compute_dtype = compute_dtype
        self.patch_embed = PatchEmbed(spec, dtype, compute_dtype)
        self.blocks = nn.ModuleList(VisionBlock(spec, dtype, compute_dtype) for _ in range(spec.depth))
        self.merger = PatchMerger(spec, dtype, compute_dtype)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """[patches, patch_dim] in patch order, sum of the grids' patches: [tokens, hidden_size]."""
        spec = self.spec
        cos, sin = vision_angles(grids, spec.merge_size, spec.head_dim, pixel_values.device)
        lengths = [grid.h * grid.w for grid in grids for _ in range(grid.t)]
        hidden_states = self.patch_embed(pixel_values.to(self.compute_dtype))
        for block in self.blocks:
            hidden_states = block(hidden_states, cos, sin, lengths)
        return self.merger(hidden_states)
