"""A decoder's layers for one row on a GPU: what a single request generates is computed here.

Six kernels a layer instead of eleven: a product takes in the norm before it and what is added after it. Knows the
decoder of `qvl.models.qwen2_vl`. Does not know how the kernels work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from qvl.kernels.fp8 import Fp8Matrix
from qvl.kernels.gpu import capability_of, early_on
from qvl.kernels.linear import OneRow
from qvl.layers.attention import KVCache, PagedAttention
from qvl.layers.linear import Linear
from qvl.layers.norm import RMSNorm

if TYPE_CHECKING:
    from qvl.models.qwen2_vl import Decoder, DecoderLayer


def decode_one(
    kernels: OneRow,
    decoder: Decoder,
    hidden_states: Tensor,  # [n, hidden]
    angles: tuple[Tensor, Tensor],
    attention: PagedAttention,
    kv_cache: KVCache,
    plan: Any,
) -> Tensor:
    """As `Qwen2VLForConditionalGeneration.forward` does it for many rows, rounded less often."""
    layer: DecoderLayer
    for layer, kv in zip(decoder.layers, kv_cache, strict=True):  # type: ignore[assignment]  # a ModuleList of them
        qkv = product(kernels, layer.self_attn.qkv_proj, hidden_states, norm=layer.input_layernorm)
        hidden_states = finish_one(kernels, layer, attention.run(qkv, angles, kv, plan), hidden_states)
    out, _ = decoder.norm(hidden_states)
    assert isinstance(out, Tensor)
    return out


def finish_one(kernels: OneRow, layer: DecoderLayer, heads: Tensor, residual: Tensor) -> Tensor:
    """As `DecoderLayer.finish`, with the sum of both that it gives."""
    mlp = layer.mlp
    hidden_states = product(kernels, layer.self_attn.o_proj, heads, residual=residual)
    gated = product(kernels, mlp.gate_up_proj, hidden_states, norm=layer.post_attention_layernorm, gated=True)
    return product(kernels, mlp.down_proj, gated, residual=hidden_states)


def product(
    kernels: OneRow,
    matrix: Linear,
    x: Tensor,
    *,
    norm: RMSNorm | None = None,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """matrix(norm(x)), its halves joined by SiLU(gate) * up when gated, plus the residual."""
    held = matrix.matrix
    weight, scales = (held.codes, held.scales) if isinstance(held, Fp8Matrix) else (matrix.weight, None)
    assert weight is not None
    return kernels.product(
        x, weight, scales=scales, norm=None if norm is None else norm.weight, eps=0.0 if norm is None else norm.eps,
        bias=matrix.bias, gated=gated, residual=residual, early=early_on(capability_of(x.device)),
    )  # fmt: skip
