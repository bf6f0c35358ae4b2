"""The shapes of a Qwen-VL model and their arithmetic: parameters, bytes, KV cache, floating-point operations.

Knows numbers only. Does not know files, devices or how anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qvl.specs.generation import GenerationDefaults


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The decoder. `mrope_section` counts the rotary frequencies (of head_dim / 2) that turn with t, h and w."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool

    @property
    def layer_matrix_parameters(self) -> int:
        """Weights of one layer's matrices: what one token multiplies with (biases and norms left out)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_parameters(self) -> int:
        biases = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        layer = self.layer_matrix_parameters + biases + 2 * self.hidden_size
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + self.hidden_size + embeddings


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The vision tower. `hidden_size` is its output, the decoder's hidden size; inside it is `embed_dim` wide."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    hidden_size: int
    hidden_act: str = "quick_gelu"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def merged_dim(self) -> int:
        """Width of `merge_size` x `merge_size` patches side by side."""
        return self.embed_dim * self.merge_size**2

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch (channel, time, height, width)."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    @property
    def block_matrix_parameters(self) -> int:
        return 4 * self.embed_dim**2 + 2 * self.embed_dim * self.mlp_dim

    @property
    def merger_matrix_parameters(self) -> int:
        return self.merged_dim * (self.merged_dim + self.hidden_size)

    @property
    def num_parameters(self) -> int:
        block = self.block_matrix_parameters + 4 * self.embed_dim + self.mlp_dim + self.embed_dim  # biases
        block += 4 * self.embed_dim  # two LayerNorms
        merger = self.merger_matrix_parameters + self.merged_dim + self.hidden_size + 2 * self.embed_dim
        return self.patch_dim * self.embed_dim + self.depth * block + merger


@dataclass(frozen=True, slots=True)
class SpecialIds:
    """Token ids with a meaning of their own."""

    eos: tuple[int, ...]
    pad: int
    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    vision_pad: int

    @property
    def never_sampled(self) -> frozenset[int]:
        """Ids that only stand for pixels; no answer may contain them."""
        return frozenset((self.vision_start, self.vision_end, self.vision_pad, self.image_pad, self.video_pad))


@dataclass(frozen=True, slots=True)
class ProcessorSpec:
    """How pictures and videos become patches. Pixel bounds are areas; for a video they count one frame, `total` all."""

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 16384
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    video_total_pixels: int = 24576 * 28 * 28

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the files of a checkpoint folder say, apart from the weights and the vocabulary.

    `dtype` is the precision the weights were saved in ("float32", "bfloat16" or "float16"), `name` the folder's name.
    """

    name: str
    folder: Path
    model_type: str
    architecture: str
    text: TextSpec
    vision: VisionSpec
    ids: SpecialIds
    processor: ProcessorSpec
    generation: GenerationDefaults
    dtype: str

    @property
    def text_parameters(self) -> int:
        return self.text.num_parameters

    @property
    def vision_parameters(self) -> int:
        return self.vision.num_parameters

    @property
    def num_parameters(self) -> int:
        return self.text_parameters + self.vision_parameters

    def weight_bytes(self, bytes_per_param: float = 2.0) -> int:
        return int(self.num_parameters * bytes_per_param)

    def quantised_weight_bytes(self, decoder_bits: float, other_bits: float, bytes_per_param: float = 2.0) -> int:
        """The decoder's layers at `decoder_bits` a weight, tower and head at `other_bits`, the rest as it is."""
        text, vision = self.text, self.vision
        decoder = text.num_layers * text.layer_matrix_parameters
        others = vision.depth * vision.block_matrix_parameters + vision.merger_matrix_parameters
        others += text.vocab_size * text.hidden_size
        rest = self.num_parameters - decoder - others
        return int(decoder * decoder_bits / 8 + others * other_bits / 8 + rest * bytes_per_param)

    def kv_bytes_per_token(self, bytes_per_value: float = 2.0) -> int:
        """Keys and values of one token in all layers."""
        return int(2 * self.text.num_layers * self.text.num_kv_heads * self.text.head_dim * bytes_per_value)

    def prefill_flops(self, num_tokens: int) -> int:
        """Operations of the decoder for a fresh prompt: matrices, causal attention, logits of the last token."""
        text = self.text
        matrices = 2 * num_tokens * text.num_layers * text.layer_matrix_parameters
        pairs = num_tokens * (num_tokens + 1) // 2
        attention = 4 * pairs * text.num_layers * text.num_heads * text.head_dim
        return matrices + attention + 2 * text.vocab_size * text.hidden_size

    def vision_flops(self, num_patches: int) -> int:
        """Operations of the vision tower for one picture of `num_patches` patches, each attending to all."""
        vision = self.vision
        matrices = (
            2 * num_patches * (vision.depth * vision.block_matrix_parameters + vision.patch_dim * vision.embed_dim)
        )
        attention = 4 * num_patches**2 * vision.depth * vision.embed_dim
        return matrices + attention + 2 * (num_patches // vision.merge_size**2) * vision.merger_matrix_parameters
