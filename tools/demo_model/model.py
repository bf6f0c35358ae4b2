"""A dense Qwen2-VL for training: batches of equal shape, weights named as in Qwen2-VL checkpoints.

The same numbers as transformers' Qwen2VLForConditionalGeneration (a test holds this), many times faster on hundreds of
small pictures. Knows tensors; does not know pictures, questions or files.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The checkpoint's dimensions."""

    vocab_size: int = 960
    hidden_size: int = 256
    intermediate_size: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    rope_theta: float = 100.0
    vision_size: int = 256
    vision_depth: int = 6
    vision_heads: int = 8
    mlp_ratio: int = 4
    rms_norm_eps: float = 1e-6


class Linear(nn.Linear):
    """Weights stay float32; the product runs in the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps))).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on the last axis; cos and sin broadcast over heads."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class VisionAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.vision_heads
        self.qkv = Linear(shape.vision_size, 3 * shape.vision_size)
        self.proj = Linear(shape.vision_size, shape.vision_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, n, c], [n, head_dim] x 2
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(out.transpose(1, 2).reshape(b, n, c))


class VisionMlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.fc1 = Linear(shape.vision_size, shape.mlp_ratio * shape.vision_size)
        self.fc2 = Linear(shape.mlp_ratio * shape.vision_size, shape.vision_size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc1(x)
        return self.fc2(y * torch.sigmoid(1.702 * y))


class VisionBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1 = LayerNorm(shape.vision_size, eps=1e-6)
        self.norm2 = LayerNorm(shape.vision_size, eps=1e-6)
        self.attn, self.mlp = VisionAttention(shape), VisionMlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, shape.vision_size, (2, 14, 14), (2, 14, 14), bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """[.., frames * 588] -> [.., c]; one frame stands for two equal ones, so its weights are summed."""
        weight = self.proj.weight.transpose(1, 2).flatten(2)  # [c, frame, 588]
        flat = weight.sum(1) if patches.shape[-1] == 588 else weight.flatten(1)
        return F.linear(patches, flat.to(patches.dtype))


class Merger(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        wide = 4 * shape.vision_size
        self.ln_q = LayerNorm(shape.vision_size, eps=1e-6)
        self.mlp = nn.Sequential(Linear(wide, wide), nn.GELU(), Linear(wide, shape.hidden_size))

    def forward(self, x: Tensor) -> Tensor:  # [b, 4n, c] -> [b, n, hidden]
        return self.mlp(self.ln_q(x).reshape(x.shape[0], x.shape[1] // 4, -1))


def block_order(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, 2x2 merge blocks one after another; rows and columns count tokens."""
    place = torch.arange(rows * 2 * columns * 2, device=device).view(rows, 2, columns, 2).transpose(1, 2).reshape(-1)
    return place // (columns * 2), place % (columns * 2)


class Vision(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.vision_size // shape.vision_heads
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.vision_depth))
        self.merger = Merger(shape)

    def rope(self, rows: int, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
        quarter = self.head_dim // 4
        speed = 10000.0 ** (-torch.arange(quarter, device=like.device, dtype=torch.float32) / quarter)
        row, column = block_order(rows, columns, like.device)
        angles = torch.cat((torch.outer(row.float(), speed), torch.outer(column.float(), speed)), dim=-1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """[b, 4 * rows * columns, 588 or 1176] in merge-block order -> [b, rows * columns, hidden]."""
        x = self.patch_embed(patches)
        cos, sin = self.rope(rows, columns, x)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head_dim = shape.hidden_size // shape.heads
        self.q_proj = Linear(shape.hidden_size, shape.hidden_size)
        self.k_proj = Linear(shape.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = Linear(shape.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [b, l, c], [b, 1, l, head_dim] x 2
        b, n, c = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        share = self.heads // self.kv_heads
        k, v = rotate(k, cos, sin).repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, n, c))

    def first_head_scores(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[b, l, l] attention scores of head 0 before the mask: what training teaches to point."""
        d = self.head_dim
        cos, sin = cos[:, 0], sin[:, 0]
        q, k = (
            F.linear(x, part.weight[:d].to(x.dtype), part.bias[:d].to(x.dtype)) for part in (self.q_proj, self.k_proj)
        )
        return rotate(q, cos, sin) @ rotate(k, cos, sin).transpose(1, 2) * d**-0.5


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)


class DemoModel(nn.Module):
    """`visual.*` and `model.*` as in the checkpoint; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.visual, self.model = Vision(shape), Decoder(shape)
        self.apply(_initialise)

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[3, b, l] -> cos, sin [b, 1, l, head_dim]: each section of frequencies follows its own axis."""
        half = self.shape.hidden_size // self.shape.heads // 2
        speed = self.shape.rope_theta ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
        own = torch.cat([positions[n : n + 1].expand(size, -1, -1) for n, size in enumerate(self.shape.mrope_section)])
        angles = own.permute(1, 2, 0).float() * speed
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def see(self, patches: list[tuple[Tensor, int, int]]) -> Tensor:
        """Patches of every slot group ([b, slots, n, width], rows, columns) -> [b, vision tokens, hidden]."""
        parts = []
        for group, rows, columns in patches:
            b, slots = group.shape[:2]
            parts.append(self.visual(group.flatten(0, 1), rows, columns).reshape(b, slots * rows * columns, -1))
        return torch.cat(parts, dim=1)

    def embed(self, ids: Tensor, features: Tensor | None, vision: Tensor) -> Tensor:
        """Token embeddings with the picture's features in their places; `vision` [b, vision tokens]."""
        x = F.embedding(ids, self.model.embed_tokens.weight)
        if features is None:
            return x
        return x.to(features.dtype).scatter(1, vision[..., None].expand(-1, -1, x.shape[-1]), features)

    def decode(self, x: Tensor, positions: Tensor, watch: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Last hidden states, and the scores of layer `watch`'s first head."""
        cos, sin = self.rope(positions, x.dtype)
        scores = None
        for n, layer in enumerate(self.model.layers):
            if n == watch and isinstance(layer, Layer):
                scores = layer.self_attn.first_head_scores(layer.input_layernorm(x), cos, sin)
            x = layer(x, cos, sin)
        return self.model.norm(x), scores

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
        nn.init.normal_(module.weight, std=0.02)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def hf_config(shape: Shape, tokens: dict[str, int]) -> dict[str, Any]:
    """config.json in Qwen2-VL's own layout."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|im_end|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "vision_start_token_id": tokens["<|vision_start|>"],
        "vision_end_token_id": tokens["<|vision_end|>"],
        "vision_token_id": tokens["<|vision_pad|>"],
        "image_token_id": tokens["<|image_pad|>"],
        "video_token_id": tokens["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 8192,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "rope_theta": shape.rope_theta,
        "sliding_window": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": shape.vision_depth,
            "embed_dim": shape.vision_size,
            "hidden_act": "quick_gelu",
            "hidden_size": shape.hidden_size,
            "in_channels": 3,
            "in_chans": 3,
            "mlp_ratio": shape.mlp_ratio,
            "num_heads": shape.vision_heads,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
        "vocab_size": shape.vocab_size,
    }
