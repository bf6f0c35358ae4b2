"""Specs: every spelling of a checkpoint's files loads, every defect is named, the arithmetic equals real models'."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from qvl.errors import CheckpointError, InvalidRequest
from qvl.specs import GenerationDefaults, ModelSpec, load_spec
from qvl.types import SamplingParams
from tests.checkpoints import VARIANTS, write_checkpoint

# config.json as published with the three sizes, and the parameters that transformers counts in them.
COMMON: dict[str, Any] = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "model_type": "qwen2_vl",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
}
TOWER = {"depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "patch_size": 14}
SIZES: dict[str, dict[str, Any]] = {
    "2B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "max_window_layers": 28, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "max_window_layers": 28, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "72B": {
        "hidden_size": 8192, "intermediate_size": 29568, "num_attention_heads": 64, "num_hidden_layers": 80,
        "num_key_value_heads": 8, "max_window_layers": 80, "vocab_size": 152064, "tie_word_embeddings": False,
    },
}  # fmt: skip


def published(size: str) -> dict[str, Any]:
    tower = {**TOWER, "hidden_size": SIZES[size]["hidden_size"], "spatial_merge_size": 2, "temporal_patch_size": 2}
    return copy.deepcopy({**COMMON, **SIZES[size], "vision_config": tower})


def written(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def spec_of(folder: Path, config: dict[str, Any], **files: dict[str, Any]) -> ModelSpec:
    return load_spec(written(folder, config, **files))


@pytest.mark.parametrize("size", SIZES)
def test_counts_the_parameters_of_the_real_models(size: str, tmp_path: Path) -> None:
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    spec = spec_of(tmp_path, published(size))
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**published(size)))
    tower = sum(p.numel() for p in model.model.visual.parameters())
    assert spec.vision_parameters == tower
    assert spec.num_parameters == sum(p.numel() for p in model.parameters())
    assert spec.text_parameters == spec.num_parameters - tower
    assert spec.weight_bytes(2) == 2 * spec.num_parameters


def test_numbers_of_the_facts(tmp_path: Path) -> None:
    kib = {size: spec_of(tmp_path, published(size)).kv_bytes_per_token(2) / 1024 for size in SIZES}
    assert kib == {"2B": 28, "7B": 56, "72B": 320}
    spec = spec_of(tmp_path, published("7B"))
    assert spec.vision.head_dim == 80
    assert spec.vision.patch_dim == 1176
    assert spec.vision.factor == 28
    assert spec.ids.never_sampled == {151652, 151653, 151654, 151655, 151656}
    assert (spec.ids.pad, spec.ids.im_start, spec.ids.im_end) == (151643, 151644, 151645)
    assert (spec.processor.min_pixels, spec.processor.max_pixels) == (3136, 12845056)
    assert spec.processor.video_min_pixels == 100_352
    assert spec.processor.video_max_pixels == 602_112
    assert spec.processor.video_total_pixels == 19_267_584
    assert spec.dtype == "bfloat16"


def test_flops_equal_a_count_of_every_matrix_product(tmp_path: Path) -> None:
    """The oracle is torch's own counter over transformers' forward pass (which takes attention as not causal)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = write_checkpoint(tmp_path, variant="plain", no_weights=True)
    config = Qwen2VLConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    spec = load_spec(folder)
    n = 37
    model = Qwen2VLForConditionalGeneration(config)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.model.language_model(input_ids=torch.zeros(1, n, dtype=torch.long))
    text = spec.text
    whole_attention = 4 * n * n * text.num_layers * text.num_heads * text.head_dim
    causal_attention = 4 * (n * (n + 1) // 2) * text.num_layers * text.num_heads * text.head_dim
    last_logits = 2 * text.vocab_size * text.hidden_size
    rotary = 2 * 3 * n * text.head_dim // 2  # three axes times half the head
    assert (
        spec.prefill_flops(n) == counter.get_total_flops() - rotary - whole_attention + causal_attention + last_logits
    )


def test_vision_flops_equal_a_count_of_every_matrix_product(tmp_path: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = write_checkpoint(tmp_path, variant="plain", no_weights=True)
    config = Qwen2VLConfig.from_pretrained(folder)
    config._attn_implementation = "eager"
    config.vision_config._attn_implementation = "eager"
    spec = load_spec(folder)
    model = Qwen2VLForConditionalGeneration(config)
    grid = torch.tensor([[1, 6, 8]])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.model.visual(torch.zeros(48, spec.vision.patch_dim), grid_thw=grid)
    rotary = counter.get_total_flops() - spec.vision_flops(48)
    assert 0 <= rotary <= 2 * 48 * spec.vision.head_dim  # the table of angles is an outer product in the reference


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "mrope"},
        {"rope_type": "mrope"},
        {"type": "default", "rope_type": "default"},
        {"rope_type": "default"},
        {},
    ],
)
def test_every_spelling_of_mrope(rope: dict[str, Any], tmp_path: Path) -> None:
    config = {**published("2B"), "rope_scaling": {**rope, "mrope_section": [16, 24, 24]}}
    assert spec_of(tmp_path, config).text.mrope_section == (16, 24, 24)


def test_rope_parameters_instead_of_rope_scaling(tmp_path: Path) -> None:
    config = published("2B")
    del config["rope_scaling"], config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [16, 24, 24]}
    spec = spec_of(tmp_path, config)
    assert (spec.text.mrope_section, spec.text.rope_theta) == ((16, 24, 24), 5e5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nested_config_says_the_same_as_the_flat_one(variant: str, tmp_path: Path) -> None:
    flat = load_spec(write_checkpoint(tmp_path / "a" / "m", variant=variant, no_weights=True))
    nested = load_spec(write_checkpoint(tmp_path / "b" / "m", variant=variant, no_weights=True, config_style="nested"))
    assert (nested.text, nested.vision, nested.ids) == (flat.text, flat.vision, flat.ids)
    assert (nested.dtype, nested.processor, nested.generation) == (flat.dtype, flat.processor, flat.generation)


def test_reads_what_transformers_writes_itself(tmp_path: Path) -> None:
    from transformers import Qwen2VLConfig

    config = Qwen2VLConfig(**published("2B"))
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    spec = load_spec(tmp_path)
    other = tmp_path / "published"
    other.mkdir()
    assert spec.text == spec_of(other, published("2B")).text
    assert spec.dtype == "bfloat16"


def test_variants_differ_in_every_dimension(checkpoints: tuple[Path, ...]) -> None:
    specs = [load_spec(folder) for folder in checkpoints]
    for part in (
        "hidden_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
    ):
        assert len({getattr(spec.text, part) for spec in specs}) == len(specs), part
    for part in ("depth", "embed_dim", "num_heads", "mlp_ratio", "head_dim"):
        assert len({getattr(spec.vision, part) for spec in specs}) == len(specs), part
    assert {spec.text.tie_word_embeddings for spec in specs} == {True, False}
    assert len({spec.text.mrope_section for spec in specs}) == len(specs)
    assert len({spec.ids.image_pad for spec in specs}) == len(specs)


def test_sizes_in_the_newer_spelling(tmp_path: Path) -> None:
    size = {"size": {"shortest_edge": 6272, "longest_edge": 100_352}}
    spec = spec_of(tmp_path, published("2B"), preprocessor_config=size)
    assert (spec.processor.min_pixels, spec.processor.max_pixels) == (6272, 100_352)
    both = {**size, "max_pixels": 50_176}
    assert spec_of(tmp_path, published("2B"), preprocessor_config=both).processor.max_pixels == 50_176


def test_both_processors_in_one_newer_file(tmp_path: Path) -> None:
    together = {"image_processor": {"max_pixels": 50_176, "image_mean": [0.5, 0.5, 0.5]}, "video_processor": {"fps": 1}}
    processor = spec_of(tmp_path, published("2B"), processor_config=together).processor
    assert (processor.max_pixels, processor.image_mean, processor.fps) == (50_176, (0.5, 0.5, 0.5), 1.0)
    assert processor.image_std == pytest.approx((0.26862954, 0.26130258, 0.27577711))


@pytest.mark.parametrize("eos", [151645, [151645, 151643]])
def test_end_tokens_are_an_id_or_a_list(eos: int | list[int], tmp_path: Path) -> None:
    spec = spec_of(tmp_path, published("2B"), generation_config={"eos_token_id": eos, "pad_token_id": 151643})
    assert spec.ids.eos == ((eos,) if isinstance(eos, int) else tuple(eos))


def test_missing_files_mean_the_published_values(tmp_path: Path) -> None:
    config = published("2B")
    del config["eos_token_id"], config["torch_dtype"]
    spec = spec_of(tmp_path, config)
    assert spec.ids.eos == (151645, 151643)
    assert spec.generation == GenerationDefaults(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert spec.dtype == "float32"


def test_control_tokens_come_from_the_vocabulary(tmp_path: Path) -> None:
    """Ids that config.json does not name are looked up in the tokenizer's files, the small one or the large one."""
    folder = write_checkpoint(tmp_path, no_weights=True)
    added = {t["content"]: t["id"] for t in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    for _ in range(2):
        ids = load_spec(folder).ids
        assert (ids.im_start, ids.im_end) == (added["<|im_start|>"], added["<|im_end|>"])
        (folder / "tokenizer_config.json").unlink(missing_ok=True)


BROKEN: list[tuple[str, Any, str]] = [
    ("hidden_size", None, "'hidden_size' is missing"),
    ("hidden_size", "1536", "'hidden_size' must be an integer"),
    ("num_hidden_layers", 0, "'num_hidden_layers' must be an integer of at least 1"),
    ("num_key_value_heads", 5, "'num_key_value_heads' (5) does not divide"),
    ("num_attention_heads", 10, "'num_attention_heads' (10) does not divide hidden_size"),
    ("rope_scaling", None, "'rope_scaling'"),
    ("rope_scaling", {"type": "mrope"}, "'rope_scaling.mrope_section' is missing"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24]}, "'rope_scaling.mrope_section' must be three"),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 23]}, "half of the head dimension"),
    ("rope_scaling", {"type": "yarn", "factor": 4, "mrope_section": [16, 24, 24]}, "'rope_scaling.type' is 'yarn'"),
    ("vision_config", None, "'vision_config.embed_dim' is missing"),
    ("vision_config", {**TOWER, "hidden_size": 99}, "'vision_config.hidden_size' (99) differs"),
    ("vision_config", {**TOWER, "hidden_act": "gelu"}, "'vision_config.hidden_act' is 'gelu'"),
    ("model_type", "llama", "'model_type' is 'llama'"),
    ("quantization_config", {"quant_method": "awq"}, "'quantization_config' is set"),
    ("torch_dtype", "int8", "'torch_dtype' is 'int8'"),
    ("image_token_id", 151936, "'image_token_id' (151936, <|image_pad|>) lies outside the vocabulary"),
    ("use_sliding_window", "no", "'use_sliding_window' must be true or false"),
    ("eos_token_id", "<|im_end|>", "'eos_token_id' must be a token id"),
    ("rms_norm_eps", float("nan"), "'rms_norm_eps' must be a number"),
]


@pytest.mark.parametrize(("key", "value", "says"), BROKEN)
def test_errors_name_the_file_and_the_key(key: str, value: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_of(tmp_path, {**published("2B"), key: value})
    assert caught.value.message.startswith("config.json: ")
    assert says in caught.value.message


def test_sliding_window_is_refused_only_where_it_acts(tmp_path: Path) -> None:
    everywhere_full = {**published("2B"), "use_sliding_window": True}
    assert spec_of(tmp_path, everywhere_full).text.num_layers == 28
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        spec_of(tmp_path, {**everywhere_full, "max_window_layers": 20})


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("preprocessor_config", {"patch_size": 16}, "'patch_size' (16) differs"),
        ("preprocessor_config", {"min_pixels": 10, "max_pixels": 5}, "'min_pixels' (10) is above"),
        ("preprocessor_config", {"do_normalize": False}, "'do_normalize' is false"),
        ("preprocessor_config", {"image_mean": [0.5, 0.5]}, "'image_mean' must be a list of three"),
        ("preprocessor_config", {"rescale_factor": 1.0}, "'rescale_factor'"),
        ("generation_config", {"top_k": 1.5}, "'top_k' must be an integer"),
        ("generation_config", {"eos_token_id": []}, "'eos_token_id'"),
    ],
)
def test_errors_of_the_other_files(file: str, content: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        spec_of(tmp_path, published("2B"), **{file: content})
    assert f"{file}.json: " in caught.value.message
    assert says in caught.value.message


def test_a_vocabulary_that_contradicts_the_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, no_weights=True)
    config = json.loads((folder / "config.json").read_text())
    written(folder, {**config, "image_token_id": config["video_token_id"]})
    with pytest.raises(CheckpointError, match=r"'image_token_id' is \d+, but the tokenizer gives <\|image_pad\|>"):
        load_spec(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_files_that_are_no_json_objects(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_spec(tmp_path)


def test_no_folder_and_no_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_spec(tmp_path)


# What Qwen2-VL checkpoints carry: greedy in disguise.
QWEN = GenerationDefaults(temperature=0.01, top_p=0.001, top_k=1, repetition_penalty=1.05)


def test_fill_takes_the_checkpoints_values_where_the_request_is_silent() -> None:
    filled = QWEN.fill(SamplingParams(), 77)
    assert (filled.temperature, filled.top_p, filled.top_k, filled.repetition_penalty) == (0.01, 0.001, 1, 1.05)
    assert (filled.max_tokens, filled.min_p, filled.seed, filled.logprobs) == (77, 0.0, None, None)


@pytest.mark.parametrize("own", [{"temperature": 0.9}, {"top_p": 0.9}])
def test_a_request_that_sets_temperature_or_top_p_is_not_greedy_in_disguise(own: dict[str, float]) -> None:
    filled = QWEN.fill(SamplingParams(**own), 77)  # type: ignore[arg-type]
    assert filled.top_k == 0
    assert filled.top_p == own.get("top_p", 1.0)
    assert filled.repetition_penalty == 1.05


def test_a_requests_own_values_win() -> None:
    filled = QWEN.fill(SamplingParams(temperature=0.5, top_k=1, top_p=0.001, min_p=0.1, max_tokens=3), 77)
    assert (filled.temperature, filled.top_k, filled.top_p, filled.min_p, filled.max_tokens) == (0.5, 1, 0.001, 0.1, 3)
    useful = GenerationDefaults(temperature=0.7, top_p=0.8, top_k=20)  # not greedy: stays
    assert useful.fill(SamplingParams(temperature=0.5), 77).top_k == 20


def test_do_sample_false_is_temperature_zero(checkpoints: tuple[Path, ...]) -> None:
    plain, tied, deep = (load_spec(folder).generation for folder in checkpoints)
    assert (plain.temperature, deep.temperature) == (0.0, 1.0)
    assert tied == GenerationDefaults(0.01, 0.001, 1, 0.0, 1.05)


def test_fill_refuses_contradictions() -> None:
    with pytest.raises(InvalidRequest, match="min_tokens"):
        QWEN.fill(SamplingParams(min_tokens=100), 77)
