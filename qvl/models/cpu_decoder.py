"""A decoder's layers for a step of decodes on a CPU: what running answers are continued with.

One call of compiled code takes a step through all layers. Between some three hundred of them, as
`Qwen2VLForConditionalGeneration.forward` makes them for other steps, Python would spend a tenth of a token. Knows the
decoder of `qvl.models.qwen2_vl`, and in which order the call wants its weights. Does not know what it does with them.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from qvl.kernels.on_cpu import all_layers
from qvl.kernels.on_cpu.all_layers import CpuDecode, Sizes, Table
from qvl.kernels.on_cpu.linear_pairs import PairMatrix
from qvl.kernels.on_cpu.paged_attention import CpuAttention
from qvl.layers.attention import Heads, KVCache, PagedAttention
from qvl.layers.linear import Linear
from qvl.specs import TextSpec

if TYPE_CHECKING:
    from qvl.models.qwen2_vl import Decoder, DecoderLayer


class CpuDecoder:
    """The call, and what it reads: where all weights lie and the cache that they were used with last.

    To look all of them up for each step takes as long as the rest of Python does in it. So weights must not move while
    a cache is in use; they may change.
    """

    def __init__(self, call: CpuDecode) -> None:
        self.call = call
        self._table: Table | None = None
        self._keys: weakref.ref[Tensor] | None = None

    def decode(
        self,
        decoder: Decoder,
        hidden_states: Tensor,  # [n, hidden], overwritten
        angles: tuple[Tensor, Tensor],
        kv_cache: KVCache,
        plan: Any,
    ) -> Tensor | None:
        """As `Qwen2VLForConditionalGeneration.forward`; None: the step is not of few decodes alone."""
        if not self.call.takes(len(hidden_states), plan):
            return None
        return self.call.run(self._table_for(decoder, kv_cache), decoder.norm.weight, hidden_states, angles, plan)

    def _table_for(self, decoder: Decoder, kv_cache: KVCache) -> Table:
        keys = kv_cache[0][0]
        if self._table is None or self._keys is None or self._keys() is not keys:
            layers = cast("list[DecoderLayer]", list(decoder.layers))
            self._table, self._keys = Table([weights_of(layer) for layer in layers], kv_cache), weakref.ref(keys)
        return self._table


def weights_of(layer: DecoderLayer) -> list[Tensor | None]:
    """In the order of `layer` in all_layers.c."""
    attention, mlp = layer.self_attn, layer.mlp
    found: list[Tensor | None] = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
    for matrix in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
        found += numbers_of(matrix)
    return found


def numbers_of(matrix: Linear) -> list[Tensor | None]:
    """Its numbers or codes, scales and bias."""
    if matrix.weight is not None:
        return [matrix.weight, None, matrix.bias]
    if isinstance(matrix.matrix, PairMatrix):
        return [matrix.numbers, None, matrix.bias]
    return [matrix.codes, matrix.scales, matrix.bias]


def cpu_decoder(spec: TextSpec, dtype: torch.dtype, form: str | None, attention: PagedAttention) -> CpuDecoder | None:
    """For the decoder of `spec` whose matrices are held in `form`, where compiled code computes all of it."""
    if not isinstance(attention, CpuAttention):
        return None
    heads = Heads(spec.num_heads, spec.num_kv_heads, spec.head_dim)
    call = all_layers.choose(Sizes(spec.hidden_size, spec.intermediate_size, heads, spec.rms_norm_eps), dtype, form)
    return None if call is None else CpuDecoder(call)
