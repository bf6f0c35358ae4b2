"""A checkpoint folder's JSON files become a `ModelSpec`.

Knows every spelling in which Qwen2-VL checkpoints are published, and refuses by name what this version cannot compute
faithfully. Does not open weights, and imports nothing from a checkpoint.
"""

from __future__ import annotations

from pathlib import Path

from qvl.errors import CheckpointError
from qvl.specs.generation import GenerationDefaults
from qvl.specs.model import ModelSpec, ProcessorSpec, SpecialIds, TextSpec, VisionSpec
from qvl.specs.section import Section, read_section

_MODEL_TYPES = ("qwen2_vl",)
_ARCHITECTURE = "Qwen2VLForConditionalGeneration"
_DTYPES = ("float32", "bfloat16", "float16")

# field of SpecialIds -> (spelling in the vocabulary, key in config.json, id in the published vocabulary)
_IDS = {
    "pad": ("<|endoftext|>", "pad_token_id", 151643),
    "im_start": ("<|im_start|>", "im_start_token_id", 151644),
    "im_end": ("<|im_end|>", "im_end_token_id", 151645),
    "vision_start": ("<|vision_start|>", "vision_start_token_id", 151652),
    "vision_end": ("<|vision_end|>", "vision_end_token_id", 151653),
    "vision_pad": ("<|vision_pad|>", "vision_token_id", 151654),
    "image_pad": ("<|image_pad|>", "image_token_id", 151655),
    "video_pad": ("<|video_pad|>", "video_token_id", 151656),
}


def load_spec(folder: str | Path) -> ModelSpec:
    """Read config.json, generation_config.json, preprocessor_config.json and the ids of the control tokens.

    Raises `CheckpointError` naming the file and the key.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = read_section(folder, "config.json", required=True)
    model_type = config.text("model_type")
    if model_type not in _MODEL_TYPES:
        raise config.fail("model_type", f"is '{model_type}'; this version serves: {', '.join(_MODEL_TYPES)}")
    if "quantization_config" in config:
        raise config.fail("quantization_config", "is set: this version serves unquantised checkpoints only")
    text_section = config.section("text_config") if "text_config" in config else config
    text = _read_text(config, text_section)
    vision = _read_vision(config.section("vision_config"), text.hidden_size)
    generation = read_section(folder, "generation_config.json")
    return ModelSpec(
        name=folder.name,
        folder=folder,
        model_type=model_type,
        architecture=_read_architecture(config),
        text=text,
        vision=vision,
        ids=_read_ids(folder, config, text_section, generation, text.vocab_size),
        processor=_read_processor(folder, vision),
        generation=_read_generation(generation),
        dtype=_read_dtype(config, text_section),
    )


def _read_architecture(config: Section) -> str:
    names = config.values.get("architectures") or [_ARCHITECTURE]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise config.fail("architectures", f"must be a list of names, not {names!r}")
    return names[0]


def _read_dtype(config: Section, text: Section) -> str:
    section = config if "dtype" in config or "torch_dtype" in config else text
    key = section.first("dtype", "torch_dtype")
    name = section.text(key, "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise section.fail(key, f"is '{name}'; known: {', '.join(_DTYPES)}")
    return name


def _read_text(config: Section, text: Section) -> TextSpec:
    hidden_size = text.integer("hidden_size")
    num_heads = text.integer("num_attention_heads")
    num_kv_heads = text.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise text.fail("num_key_value_heads", f"({num_kv_heads}) does not divide num_attention_heads ({num_heads})")
    if "head_dim" not in text and hidden_size % num_heads:
        raise text.fail("num_attention_heads", f"({num_heads}) does not divide hidden_size ({hidden_size})")
    head_dim = text.integer("head_dim", hidden_size // num_heads)
    num_layers = text.integer("num_hidden_layers")
    if text.flag("use_sliding_window", False) and text.integer("max_window_layers", num_layers, low=0) < num_layers:
        raise text.fail("use_sliding_window", "is true: sliding-window attention is not served by this version")
    if text.text("hidden_act", "silu") != "silu":
        raise text.fail("hidden_act", f"is '{text.text('hidden_act')}'; only 'silu' is known")
    tied = text if "tie_word_embeddings" in text else config
    rope, theta = _find_rope(config, text)
    return TextSpec(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.integer("intermediate_size"),
        vocab_size=text.integer("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        mrope_section=_read_mrope_section(rope, head_dim),
        max_position_embeddings=text.integer("max_position_embeddings", 32768),
        tie_word_embeddings=tied.flag("tie_word_embeddings", False),
    )


def _find_rope(config: Section, text: Section) -> tuple[Section, float]:
    """The object that holds `mrope_section` (under its old or new name, nested or not), and the rotary base."""
    for place in (text, config):
        for key in ("rope_parameters", "rope_scaling"):
            if key in place:
                rope = place.section(key)
                base = next((s for s in (rope, text, config) if "rope_theta" in s), text)
                return rope, base.number("rope_theta", 1_000_000.0, low=1.0)
    raise text.fail("rope_scaling", "(or 'rope_parameters') is missing; it holds 'mrope_section'")


def _read_mrope_section(rope: Section, head_dim: int) -> tuple[int, int, int]:
    key = rope.first("rope_type", "type")
    kind = rope.text(key, "default")
    if kind not in ("mrope", "default"):
        raise rope.fail(key, f"is '{kind}'; only 'mrope' (also spelt 'default') is served by this version")
    section = rope.values.get("mrope_section")
    if section is None:
        raise rope.fail("mrope_section", "is missing")
    if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and n >= 0 for n in section):
        raise rope.fail("mrope_section", f"must be three counts, not {section!r}")
    if 2 * sum(section) != head_dim:
        raise rope.fail("mrope_section", f"{section} must add up to half of the head dimension ({head_dim} / 2)")
    return section[0], section[1], section[2]


def _read_vision(vision: Section, text_hidden: int) -> VisionSpec:
    embed_dim = vision.integer("embed_dim")
    num_heads = vision.integer("num_heads")
    if embed_dim % num_heads or (embed_dim // num_heads) % 4:
        raise vision.fail("num_heads", f"({num_heads}) must divide embed_dim ({embed_dim}) into multiples of 4")
    hidden_size = vision.integer("hidden_size", text_hidden)
    if hidden_size != text_hidden:
        raise vision.fail("hidden_size", f"({hidden_size}) differs from the decoder's ({text_hidden})")
    if vision.text("hidden_act", "quick_gelu") != "quick_gelu":
        raise vision.fail("hidden_act", f"is '{vision.text('hidden_act')}'; only 'quick_gelu' is known")
    return VisionSpec(
        depth=vision.integer("depth"),
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_ratio=vision.number("mlp_ratio", 4.0),
        in_channels=vision.integer(vision.first("in_channels", "in_chans"), 3),
        patch_size=vision.integer("patch_size", 14),
        temporal_patch_size=vision.integer("temporal_patch_size", 2),
        merge_size=vision.integer("spatial_merge_size", 2),
        hidden_size=hidden_size,
    )


def _vocabulary_ids(folder: Path) -> dict[str, int]:
    """Spelling -> id of the control tokens, from the small tokenizer_config.json or else tokenizer.json."""
    declared = read_section(folder, "tokenizer_config.json").section("added_tokens_decoder").values
    found = {
        entry.get("content"): int(id) for id, entry in declared.items() if isinstance(entry, dict) and id.isdigit()
    }
    wanted = {spelling for spelling, _, _ in _IDS.values()}
    if not wanted <= found.keys():
        added = read_section(folder, "tokenizer.json").values.get("added_tokens") or []
        found |= {entry["content"]: entry["id"] for entry in added if isinstance(entry, dict) and "content" in entry}
    return {spelling: found[spelling] for spelling in wanted & found.keys()}


def _read_ids(folder: Path, config: Section, text: Section, generation: Section, vocab_size: int) -> SpecialIds:
    vocabulary = _vocabulary_ids(folder)
    ids: dict[str, int] = {}
    for field, (spelling, key, published) in _IDS.items():
        place = next((s for s in (config, text) if key in s), config)
        ids[field] = place.integer(key, vocabulary.get(spelling, published), low=0)
        in_vocabulary = vocabulary.get(spelling, ids[field])
        if field != "pad" and ids[field] != in_vocabulary:
            raise place.fail(key, f"is {ids[field]}, but the tokenizer gives {spelling} the id {in_vocabulary}")
        if ids[field] >= vocab_size:
            raise place.fail(key, f"({ids[field]}, {spelling}) lies outside the vocabulary of {vocab_size}")
    if "pad_token_id" in generation:
        ids["pad"] = generation.integer("pad_token_id", low=0)
    eos = _read_eos((generation, config, text), (ids["im_end"], ids["pad"]), vocab_size)
    return SpecialIds(eos=eos, **ids)


def _read_eos(places: tuple[Section, ...], default: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """End tokens: an id or a list of ids in the first file that names any."""
    place = next((section for section in places if "eos_token_id" in section), None)
    if place is None:
        return default
    value = place.values["eos_token_id"]
    ids = value if isinstance(value, list) else [value]
    if not ids or not all(type(id) is int and 0 <= id < vocab_size for id in ids):
        raise place.fail("eos_token_id", f"must be a token id below {vocab_size} or a list of them, not {value!r}")
    return tuple(ids)


def _read_generation(file: Section) -> GenerationDefaults:
    """Neutral where the file is silent; `do_sample: false` means greedy."""
    return GenerationDefaults(
        temperature=file.number("temperature", 1.0) if file.flag("do_sample", True) else 0.0,
        top_p=file.number("top_p", 1.0) or 1.0,
        top_k=file.integer("top_k", 0, low=-1),
        min_p=file.number("min_p", 0.0),
        repetition_penalty=file.number("repetition_penalty", 1.0) or 1.0,
    )


def _read_processor(folder: Path, vision: VisionSpec) -> ProcessorSpec:
    together = read_section(folder, "processor_config.json")  # newer checkpoints keep both processors in one file
    image = read_section(folder, "preprocessor_config.json")
    image = image if image.values else together.section("image_processor")
    video = read_section(folder, "video_preprocessor_config.json")
    video = video if video.values else together.section("video_processor")
    _check_processor(image, vision)
    usual = ProcessorSpec()
    low, high = _read_bounds(image, usual.min_pixels, usual.max_pixels)
    video_low, video_high = _read_bounds(video, usual.video_min_pixels, usual.video_max_pixels)
    return ProcessorSpec(
        min_pixels=low,
        max_pixels=high,
        image_mean=image.triple("image_mean", usual.image_mean),
        image_std=image.triple("image_std", usual.image_std),
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        fps=video.number("fps", usual.fps),
        min_frames=video.integer("min_frames", usual.min_frames),
        max_frames=video.integer("max_frames", usual.max_frames),
        video_min_pixels=video_low,
        video_max_pixels=video_high,
        video_total_pixels=video.integer("total_pixels", usual.video_total_pixels),
    )


def _check_processor(image: Section, vision: VisionSpec) -> None:
    """Refuse settings that contradict the vision tower, or steps that this version would do differently."""
    for key, ours in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.merge_size),
    ):
        if image.integer(key, ours) != ours:
            raise image.fail(key, f"({image.integer(key)}) differs from config.json's vision_config ({ours})")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not image.flag(key, True):
            raise image.fail(key, "is false: this version always resizes, rescales and normalises")
    if abs(image.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        raise image.fail("rescale_factor", f"({image.number('rescale_factor')}) must be 1/255")


def _read_bounds(section: Section, low: int, high: int) -> tuple[int, int]:
    """Pixel areas: `min_pixels` / `max_pixels`, else the newer `size: {shortest_edge, longest_edge}`."""
    size = section.section("size")
    low = section.integer("min_pixels", size.integer("shortest_edge", size.integer("min_pixels", low)))
    high = section.integer("max_pixels", size.integer("longest_edge", size.integer("max_pixels", high)))
    if low > high:
        raise section.fail("min_pixels", f"({low}) is above max_pixels ({high})")
    return low, high
