"""Qwen2-VL: a vision tower and a causal decoder with three-axis rotary positions over a paged cache.

Knows the network and what its checkpoint calls each weight. Does not know requests, prompts, sampling or files.
Request state comes in as tensors and goes out as tensors: nothing is remembered between two calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from qvl.kernels.attention import choose_attention
from qvl.kernels.few_rows import gated_few
from qvl.kernels.fp8 import Rounded
from qvl.kernels.fused import silu_and_mul
from qvl.kernels.gpu import capability_of
from qvl.kernels.linear import (
    MULTIPLE,
    OneRow,
    compute_dtype_for,
    describe_linear,
    form_of_numbers,
    gated_many,
    joins,
    one_row,
    takes_one,
)
from qvl.kernels.segments import describe_segments
from qvl.kernels.sums import Sums, finished
from qvl.layers.attention import AttentionMetadata, Heads, KVCache, PagedAttention
from qvl.layers.linear import Linear
from qvl.layers.norm import RMSNorm
from qvl.layers.rotary import MRope
from qvl.models.cpu_decoder import cpu_decoder
from qvl.models.one_row import decode_one, finish_one
from qvl.models.vision import VisionTower, chunks
from qvl.specs import ModelSpec, TextSpec
from qvl.types import Grid

# Rows of a prefill that go through an MLP at a time: its widest activation takes 76 kB a row in the 7B. So many rows
# keep an H200 as busy as any more do.
MLP_ROWS = 1152


class Attention(nn.Module):
    """Grouped-query self-attention; biased q, k, v in one matrix."""

    def __init__(self, spec: TextSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.qkv_proj = Linear(
            spec.hidden_size, (q_size, kv_size, kv_size), bias=True, dtype=dtype, compute_dtype=compute_dtype
        )
        self.o_proj = Linear(q_size, spec.hidden_size, bias=False, dtype=dtype, compute_dtype=compute_dtype)

    def forward(
        self,
        hidden_states: Tensor | Rounded,  # [n, hidden]
        angles: tuple[Tensor, Tensor],
        attention: PagedAttention,
        kv: tuple[Tensor, Tensor],
        plan: Any,
    ) -> Tensor:  # [n, heads * head_dim], what `o_proj` takes
        qkv = self.qkv_proj.sums(hidden_states) if attention.takes_sums else self.qkv_proj(hidden_states)
        return attention.run(qkv, angles, kv, plan)


class MLP(nn.Module):
    """SwiGLU; gate and up in one matrix."""

    def __init__(self, spec: TextSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        size = spec.intermediate_size
        self.gate_up_proj = Linear(spec.hidden_size, (size, size), bias=False, dtype=dtype, compute_dtype=compute_dtype)
        self.down_proj = Linear(size, spec.hidden_size, bias=False, dtype=dtype, compute_dtype=compute_dtype)

    def forward(self, hidden_states: Tensor | Rounded) -> Tensor:
        return self.down_proj(self.gated(hidden_states))

    def sums(self, hidden_states: Tensor | Rounded) -> Tensor | Sums:
        """The same for who finishes it."""
        return self.down_proj.sums(self.gated(hidden_states))

    def gated(self, hidden_states: Tensor | Rounded) -> Tensor | Rounded:  # [n, hidden] -> [n, intermediate]
        weight = self.gate_up_proj.weight
        if weight is not None and isinstance(hidden_states, Tensor):
            joined = gated_few(hidden_states, weight)
            joined = gated_many(hidden_states, weight) if joined is None else joined
            if joined is not None:
                return joined
        return silu_and_mul(self.gate_up_proj(hidden_states), self.down_proj.eight_bits)

    def rows_at_once(self, rows: int) -> int:
        """How many of them may go through it at a time: twice as many where gate and up take no memory."""
        weight = self.gate_up_proj.weight
        return 2 * MLP_ROWS if weight is not None and joins(weight, rows) else MLP_ROWS


class DecoderLayer(nn.Module):
    """Attention and MLP; each norm takes in what the part before it adds to the residual stream.

    `attend` needs all rows of a step, whose keys and values it stores; `finish` takes each row by itself.
    """

    def __init__(self, spec: TextSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, compute_dtype)
        self.self_attn = Attention(spec, dtype, compute_dtype)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, compute_dtype)
        self.mlp = MLP(spec, dtype, compute_dtype)

    def attend(
        self,
        delta: Tensor | Sums,  # [n, hidden], what the layer before adds
        residual: Tensor | None,  # [n, hidden]; None for the first layer
        angles: tuple[Tensor, Tensor],
        attention: PagedAttention,
        kv: tuple[Tensor, Tensor],
        plan: Any,
    ) -> tuple[Tensor, Tensor]:
        attn = self.self_attn
        hidden_states, residual = self.input_layernorm(delta, residual, attn.qkv_proj.eight_bits)
        return attn(hidden_states, angles, attention, kv, plan), residual

    def finish(self, heads: Tensor, residual: Tensor) -> tuple[Tensor | Sums, Tensor]:
        """What this layer adds [n, hidden], and the stream it is added to; both arguments may be overwritten."""
        most = self.mlp.rows_at_once(len(heads))
        if len(heads) <= most:
            hidden_states, residual = self.behind_attention(heads, residual)
            return self.mlp.sums(hidden_states), residual
        # Row by row nothing but `heads` is read, so what comes out may lie where it was.
        deltas = heads if heads.shape == residual.shape else torch.empty_like(residual)
        for rows in chunks(len(heads), most):
            before = residual[rows]
            hidden_states, after = self.behind_attention(heads[rows], before)
            deltas[rows] = self.mlp(hidden_states)
            if after.data_ptr() != before.data_ptr():
                residual[rows] = after
        return deltas, residual

    def behind_attention(self, heads: Tensor, residual: Tensor) -> tuple[Tensor | Rounded, Tensor]:
        """What goes into the MLP, and the stream with what attention added."""
        delta = self.self_attn.o_proj.sums(heads)
        return self.post_attention_layernorm(delta, residual, self.mlp.gate_up_proj.eight_bits)


class Decoder(nn.Module):
    """The weights under the checkpoint's `model.`: embeddings, layers, final norm."""

    def __init__(self, spec: TextSpec, dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Linear(
            spec.hidden_size, spec.vocab_size, bias=False, dtype=dtype, compute_dtype=compute_dtype
        )
        self.layers = nn.ModuleList(DecoderLayer(spec, dtype, compute_dtype) for _ in range(spec.num_layers))
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, compute_dtype)


class Qwen2VLForConditionalGeneration(nn.Module):
    """The whole network. Parameters stand on `meta` until `qvl.models.weights.load_weights` gives them values.

    `dtype` is the dtype of the weight matrices. Activations have `compute_dtype`: the same on a GPU, fp32 on a CPU,
    where 16-bit weights are a way to read less memory and the arithmetic is done in fp32.
    """

    # How the checkpoints of the last years spell the same weight, newest first, and what is stored as one matrix here.
    RENAMES: tuple[tuple[str, str], ...] = (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
        ("model.lm_head.", "lm_head."),
    )
    MERGED: Mapping[str, tuple[str, ...]] = MappingProxyType(
        {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    )

    # What `quantization` rounds, by the beginnings of names, and to what. The patch embedding is small and stays as it
    # is. The tower is computed once per picture and the head decides between words: both keep 8 bits, or 16 beside fp8,
    # whose numbers are coarser.
    QUANTISED: Mapping[str, Mapping[str, str]] = MappingProxyType(
        {
            "none": {},
            "int8": {"model.layers.": "int8", "lm_head": "int8", "visual.blocks.": "int8", "visual.merger.": "int8"},
            "int4": {"model.layers.": "int4", "lm_head": "int8", "visual.blocks.": "int8", "visual.merger.": "int8"},
            "fp8": {"model.layers.": "fp8"},
        }
    )

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device | str,
        quantization: str = "none",
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.spec = spec
        self.quantization = quantization
        self.dtype = dtype
        self.device = torch.device(device)
        self.compute_dtype = compute_dtype_for(dtype, self.device)
        heads = Heads(spec.text.num_heads, spec.text.num_kv_heads, spec.text.head_dim)
        self.attention, self.attention_reason = choose_attention(
            self.device, self.compute_dtype, heads, capability_of(self.device), attention_backend
        )
        self.vision_reason = describe_segments(self.compute_dtype, self.device, spec.vision.head_dim, dtype)
        self.linear_reason = describe_linear(dtype, self.device, quantization)
        self.form_of_numbers = form_of_numbers(dtype, self.device)
        text, vision = spec.text, spec.vision
        self.mrope = MRope(text.head_dim, text.rope_theta, text.mrope_section, self.device)
        self.model = Decoder(text, dtype, self.compute_dtype)
        self.cpu_decoder = cpu_decoder(text, dtype, self.form_of("model.layers."), self.attention)
        self.visual = VisionTower(vision, dtype, self.compute_dtype)
        if not text.tie_word_embeddings:
            self.lm_head = Linear(
                text.hidden_size, text.vocab_size, bias=False, dtype=dtype, compute_dtype=self.compute_dtype
            )
        patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.checkpoint_shapes = {"visual.patch_embed.proj.weight": (vision.embed_dim, *patch)}

    def form_of(self, path: str) -> str | None:
        """What the matrix of the layer called `path` is held in; None: as the checkpoint has it."""
        if path == "model.embed_tokens":
            if not self.spec.text.tie_word_embeddings:
                return None  # nothing is multiplied with it
            path = "lm_head"
        rules = self.QUANTISED[self.quantization].items()
        return next((form for start, form in rules if path.startswith(start)), self.form_of_numbers)

    def encode_media(self, pixel_values: Tensor | list[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Patches [sum of patches, patch_dim] of all pictures and videos of a step: [sum of tokens, hidden].

        They may come as a list of parts in order, which is emptied to free their memory early.
        """
        return self.visual(pixel_values, grids)

    def embed(self, token_ids: Tensor) -> Tensor:  # int [n] -> [n, hidden]
        """Token embeddings in the dtype of the activations; the caller overwrites rows of pictures."""
        return self.model.embed_tokens.rows(token_ids).to(self.compute_dtype)

    def forward(
        self,
        hidden_states: Tensor,  # [n, hidden]
        positions: Tensor,  # int64 [3, n]
        kv_cache: KVCache,
        metadata: AttentionMetadata,
        rows: Tensor | None = None,  # int64 [m]
    ) -> Tensor:
        """After the final norm [n, hidden]; the cache gains n tokens. With `rows`, only these are computed to the end:
        [m, hidden]. `hidden_states` may be overwritten: norms add to them in place."""
        angles = self.mrope(positions)
        plan = self.attention.plan(metadata)
        out = self._decode_at_once(hidden_states, angles, kv_cache, plan)
        if out is not None:
            return out if rows is None else out.index_select(0, rows)
        delta: Tensor | Sums = hidden_states
        residual = None
        layers = cast("list[DecoderLayer]", list(self.model.layers))
        *most, (last, kv_of_last) = zip(layers, kv_cache, strict=True)
        for layer, kv in most:
            delta, residual = layer.finish(*layer.attend(delta, residual, angles, self.attention, kv, plan))
        heads, residual = last.attend(delta, residual, angles, self.attention, kv_of_last, plan)
        if rows is not None:
            heads, residual = heads.index_select(0, rows), residual.index_select(0, rows)
        return self._end(last, heads, residual)

    def _decode_at_once(
        self, hidden_states: Tensor, angles: tuple[Tensor, Tensor], kv_cache: KVCache, plan: Any
    ) -> Tensor | None:
        """`forward` by who computes all layers of such a step faster, where there is one."""
        kernels = self.one_row_kernels(hidden_states)
        if kernels is not None:
            return decode_one(kernels, self.model, hidden_states, angles, self.attention, kv_cache, plan)
        if self.cpu_decoder is not None:
            return self.cpu_decoder.decode(self.model, hidden_states, angles, kv_cache, plan)
        return None

    def _end(self, last: DecoderLayer, heads: Tensor, residual: Tensor) -> Tensor:
        """What stands behind the attention of the last layer."""
        if not len(heads):
            return residual
        kernels = self.one_row_kernels(residual)
        if kernels is not None:
            out, _ = self.model.norm(finish_one(kernels, last, heads, residual))
        else:
            out, _ = self.model.norm(*last.finish(heads, residual))
        assert isinstance(out, Tensor)
        return out

    def one_row_kernels(self, hidden_states: Tensor) -> OneRow | None:
        """The kernels that compute a single row faster, where they run and take these matrices."""
        sizes = (self.spec.text.hidden_size, self.spec.text.intermediate_size)
        if not takes_one(hidden_states) or any(size % MULTIPLE for size in sizes):
            return None
        return one_row(self.device, self.compute_dtype)

    def logits(self, hidden_states: Tensor) -> Tensor:  # [m, hidden] -> [m, vocab]
        """Scores over the vocabulary; the caller passes the rows that need them."""
        head = self.model.embed_tokens if self.spec.text.tie_word_embeddings else self.lm_head
        return finished(head.sums(hidden_states))
