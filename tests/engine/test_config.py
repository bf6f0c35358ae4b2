"""Options become numbers once; whatever cannot work is refused in words for the person who typed it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from qvl.engine.config import DeviceFacts, EngineConfig, EngineOptions, resolve
from qvl.engine.locate import demo_folder, find_model
from qvl.engine.options import parse_bytes, parse_mm_limits
from qvl.errors import CheckpointError, ConfigError
from qvl.specs import load_spec
from qvl.types import PixelLimits

GIB = 1 << 30
CPU = DeviceFacts("cpu", (0, 0), 16 * GIB, "float32", 6)
H200 = DeviceFacts("cuda", (9, 0), 140 * GIB, "float32", 16)
OLD_GPU = DeviceFacts("cuda", (7, 5), 11 * GIB, "float32", 8)


def configure(checkpoint: Path, facts: DeviceFacts = CPU, **options: object) -> EngineConfig:
    return resolve(EngineOptions.from_dict({"model": str(checkpoint), **options}), facts)


def test_nothing_is_open_after_resolving(checkpoint: Path) -> None:
    config = configure(checkpoint)
    assert all(getattr(config, field.name) is not None for field in dataclasses.fields(config))
    assert "auto" not in (config.device, config.dtype)
    assert config.num_blocks is not None
    assert config.num_blocks * config.block_size >= config.max_model_len == 4096
    assert (config.max_num_batched_tokens, config.num_threads, config.device) == (2048, 6, "cpu")
    assert config.limit_mm_per_prompt == {"image": 4, "video": 1}


def test_a_gpu_leaves_only_the_measured_number_open(checkpoint: Path) -> None:
    config = configure(checkpoint, H200)
    assert config.num_blocks is None
    assert config.max_num_batched_tokens == 8192
    measured = config.with_kv_memory(100 * config.block_bytes + 1)
    assert (measured.num_blocks, measured.max_model_len) == (100, 1600)
    assert measured.kv_cache_memory == 100 * config.block_bytes


@pytest.mark.parametrize(
    ("facts", "asked", "dtype"),
    [
        (H200, "auto", "bfloat16"),
        (H200, "half", "float16"),
        (OLD_GPU, "auto", "float16"),
        (OLD_GPU, "float32", "float32"),
        (CPU, "auto", "float32"),
        (dataclasses.replace(CPU, preferred_cpu_dtype="bfloat16"), "auto", "bfloat16"),
        (CPU, "bfloat16", "bfloat16"),
        (CPU, "torch.float16", "float16"),
    ],
)
def test_dtype(checkpoint: Path, facts: DeviceFacts, asked: str, dtype: str) -> None:
    assert configure(checkpoint, facts, dtype=asked).dtype == dtype


def test_bfloat16_is_refused_where_the_gpu_has_none(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs compute capability 8\.0, this GPU has 7\.5; use --dtype half"):
        configure(checkpoint, OLD_GPU, dtype="bfloat16")


def test_quantised_weights_leave_more_room(checkpoint: Path) -> None:
    plain, small = configure(checkpoint), configure(checkpoint, quantization="int4")
    assert (plain.quantization, plain.precision) == ("none", plain.dtype)
    assert small.precision == "int4 (rest float32)"
    assert small.weight_bytes < configure(checkpoint, quantization="int8").weight_bytes < plain.weight_bytes
    assert configure(checkpoint, quantization="none") == plain


@pytest.mark.parametrize(
    ("facts", "options", "says"),
    [
        (H200, {"quantization": "int8"}, "'quantization' int8 runs on a CPU only"),
        (H200, {"quantization": "int4"}, "'quantization' int4 runs on a CPU only"),
        (CPU, {"quantization": "fp8"}, "'quantization' fp8 needs a GPU with fp8 instructions"),
        (
            OLD_GPU,
            {"quantization": "fp8"},
            r"needs compute capability 8\.9 or newer .* this GPU has 7\.5; leave it out",
        ),
        (H200, {"quantization": "fp8", "dtype": "half"}, "works beside bfloat16 only, not float16"),
    ],
)
def test_quantization_where_it_cannot_run(
    checkpoint: Path, facts: DeviceFacts, options: dict[str, str], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        configure(checkpoint, facts, **options)


def test_fp8_halves_the_decoder_and_leaves_tower_and_head(checkpoint: Path) -> None:
    plain, small = configure(checkpoint, H200), configure(checkpoint, H200, quantization="fp8")
    text = plain.spec.text
    assert small.precision == "fp8 (rest bfloat16)"
    assert plain.weight_bytes - small.weight_bytes == text.num_layers * text.layer_matrix_parameters


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU was found"):
        configure(checkpoint, CPU, device="cuda")


def test_the_kv_cache_default_is_a_part_of_what_is_free(checkpoint: Path) -> None:
    config = configure(checkpoint, max_num_seqs=8)
    per_request = 4096 // 16 * config.block_bytes
    assert config.kv_cache_memory == 8 * per_request  # more than eight full requests would never be used
    scarce = dataclasses.replace(CPU, total_memory=config.spec.weight_bytes(4) + 8 * per_request)
    assert configure(checkpoint, scarce).kv_cache_memory == 2 * per_request
    none_free = dataclasses.replace(CPU, total_memory=0)
    assert configure(checkpoint, none_free).num_blocks == 4096 // 16  # one full request, whatever happens


def test_the_kv_cache_can_be_given(checkpoint: Path) -> None:
    config = configure(checkpoint, kv_cache_memory="1MiB")
    assert config.num_blocks == GIB // 1024 // config.block_bytes
    assert config.max_model_len == config.num_blocks * 16 < 4096  # lowered to what fits
    assert configure(checkpoint, num_blocks=300).num_blocks == 300
    on_gpu = configure(checkpoint, H200, kv_cache_memory="1MiB")
    assert on_gpu.num_blocks == (1 << 20) // on_gpu.block_bytes


@pytest.mark.parametrize(("facts", "where"), [(CPU, "machine"), (H200, "GPU")])
def test_a_kv_cache_that_does_not_fit_beside_the_weights_is_refused(
    checkpoint: Path, facts: DeviceFacts, where: str
) -> None:
    left = facts.total_memory - configure(checkpoint, facts).weight_bytes
    with pytest.raises(ConfigError, match=rf"'kv_cache_memory' asks for 921600.00 GiB .* this {where} has .* less"):
        configure(checkpoint, facts, kv_cache_memory="900TiB")
    with pytest.raises(ConfigError, match="'kv_cache_memory'"):
        configure(checkpoint, facts, kv_cache_memory=left + 1)
    assert configure(checkpoint, facts, kv_cache_memory=left).num_blocks
    with pytest.raises(ConfigError, match="'num_blocks' asks for"):
        configure(checkpoint, facts, num_blocks=1 << 40)


def test_a_given_length_that_does_not_fit_is_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise --kv-cache-memory, or lower --max-model-len to \d+"):
        configure(checkpoint, kv_cache_memory="1MiB", max_model_len=4096)
    with pytest.raises(ConfigError, match="trained for 4096 positions"):
        configure(checkpoint, max_model_len=4097)
    measured = configure(checkpoint, H200, max_model_len=4096)
    with pytest.raises(ConfigError, match="--gpu-memory-utilization"):
        measured.with_kv_memory(measured.block_bytes)
    with pytest.raises(ConfigError):
        configure(checkpoint, H200).with_kv_memory(0)


def test_weights_that_do_not_fit_a_gpu_are_refused_before_loading(checkpoint: Path) -> None:
    small = dataclasses.replace(OLD_GPU, total_memory=100_000)
    with pytest.raises(ConfigError, match="the weights take"):
        configure(checkpoint, small)


def test_more_sequences_than_tokens_of_a_step(checkpoint: Path) -> None:
    assert configure(checkpoint, max_num_batched_tokens=16).max_num_seqs == 16
    with pytest.raises(ConfigError, match="max_num_seqs"):
        configure(checkpoint, max_num_batched_tokens=16, max_num_seqs=17)


def test_config_and_options_travel_as_json(checkpoint: Path, tmp_path: Path) -> None:
    options = EngineOptions.from_dict(
        {
            "model": str(checkpoint),
            "allowed_local_media_path": str(tmp_path),
            "mm_processor_kwargs": {"max_pixels": 7840, "fps": 1.5},
        }
    )
    assert EngineOptions.from_json(options.to_json()) == options
    config = resolve(options, H200)
    again = EngineConfig.from_json(config.to_json())
    assert again == config
    assert again.policy.allowed_local_path == tmp_path.resolve()
    assert again.spec == load_spec(checkpoint)
    assert again.limits == PixelLimits(max_pixels=7840, fps=1.5)
    json.loads(config.to_json())


def test_the_media_policy_keeps_its_own_defaults(checkpoint: Path) -> None:
    policy = configure(checkpoint, max_media_bytes="2 MB", allow_private_hosts=True).policy
    assert (policy.max_bytes, policy.allow_private_hosts, policy.allow_any_local_path) == (2 << 20, True, False)
    assert policy.max_image_pixels >= 80_000_000
    with pytest.raises(ConfigError, match="is no folder"):
        configure(checkpoint, allowed_local_media_path="/nowhere/at/all")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_modle_len": 5}, "unknown option 'max_modle_len'; did you mean 'max_model_len'?"),
        ({"max_model_len": "long"}, "'max_model_len' must be a whole number"),
        ({"max_model_len": 0}, "'max_model_len' must be a whole number of at least 1"),
        ({"max_model_len": 2.5}, "'max_model_len' must be a whole number"),
        ({"block_size": True}, "'block_size' must be a whole number"),
        ({"dtype": "int4"}, "'dtype' must be one of auto, half"),
        ({"device": "tpu"}, "'device' must be one of auto, cpu, cuda"),
        ({"load_format": "pt"}, "'load_format' must be one of"),
        ({"quantization": "int2"}, "'quantization' must be one of none, int8, int4, fp8"),
        ({"attention_backend": "flash"}, "'attention_backend' must be one of auto, triton, sdpa, cpu"),
        ({"tensor_parallel_size": 2}, "runs a model on one device"),
        ({"pipeline-parallel-size": "4"}, "'pipeline_parallel_size' is 4"),
        ({"gpu_memory_utilization": 1.5}, "'gpu_memory_utilization' must be above 0 and at most 1"),
        ({"gpu_memory_utilization": "much"}, "must be a number"),
        ({"gpu_memory_utilization": "nan"}, "'gpu_memory_utilization' must be above 0 and at most 1"),
        ({"limit_mm_per_prompt": "images=3"}, "not 'images'; did you mean 'image'?"),
        ({"limit_mm_per_prompt": "image:3"}, "written as image=4,video=1"),
        ({"limit_mm_per_prompt": '{"image": '}, "not valid JSON"),
        ({"limit_mm_per_prompt": "image=-1"}, "N of at least 0"),
        ({"limit_mm_per_prompt": 3}, "key=value pairs"),
        ({"mm_processor_kwargs": {"max_pixel": 3}}, "did you mean 'max_pixels'?"),
        ({"mm_processor_kwargs": {"max_pixels": 0}}, "a whole N above 0"),
        ({"mm_processor_kwargs": {"max_pixels": 1.5}}, "a whole N above 0"),
        ({"mm_processor_kwargs": "fps=inf"}, "above 0"),
        ({"kv_cache_memory": "lots"}, "a size like 2GiB"),
        ({"enable_prefix_caching": "maybe"}, "true or false"),
        ({"model": 5}, "'model' must be a text"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineOptions.from_dict(options)
    assert says in caught.value.message


def test_options_as_people_type_them() -> None:
    options = EngineOptions.from_dict(
        {
            "--max-model-len": "8784",
            "gpu-memory-utilization": "0.8",
            "limit_mm_per_prompt": "image=10",
            "enable-prefix-caching": "false",
            "kv_cache_memory": "1.5g",
            "dtype": "half",
            "seed": None,
            "max_num_seqs": "auto",
            "mm_processor_kwargs": '{"max_pixels": 1003520}',
        }
    )
    assert options == EngineOptions(
        max_model_len=8784,
        gpu_memory_utilization=0.8,
        limit_mm_per_prompt={"image": 10, "video": 1},
        enable_prefix_caching=False,
        kv_cache_memory=3 * GIB // 2,
        dtype="float16",
        mm_processor_kwargs={"max_pixels": 1003520},
    )


def test_sizes_and_counts_as_texts() -> None:
    sizes = {"1024": 1024, "1k": 1024, "512 MB": 512 << 20, "2GiB": 2 * GIB, "0.5T": 512 * GIB}
    assert {text: parse_bytes("x", text) for text in sizes} == sizes
    assert parse_mm_limits('{"image": 2}') == parse_mm_limits(" image = 2 ") == {"image": 2}


def test_models_are_found_by_path_and_by_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("QVL_MODELS", str(tmp_path / "shelf"))
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "Tiny-VL").symlink_to(checkpoint)
    snapshot = tmp_path / "hub" / "models--Owner--Cached" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoint)
    assert find_model(str(checkpoint)) == checkpoint.resolve()
    assert find_model("Tiny-VL") == find_model("Qwen/Tiny-VL") == checkpoint.resolve()
    assert find_model("Owner/Cached").resolve() == checkpoint.resolve()
    assert find_model("demo") == demo_folder()
    with pytest.raises(ConfigError, match="did you mean 'Tiny-VL'"):
        find_model("Tiny-VLM")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        find_model(str(tmp_path / "shelf"))


def test_clients_call_the_model_by_the_name_that_was_typed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert configure(checkpoint).served_name == checkpoint.name
    assert configure(checkpoint, served_model_name="mine").served_name == "mine"
    monkeypatch.setenv("QVL_MODELS", str(checkpoint.parent))
    monkeypatch.chdir("/")
    options = EngineOptions(model=f"Qwen/{checkpoint.name}")
    assert resolve(options, CPU).served_name == f"Qwen/{checkpoint.name}"


def test_a_broken_checkpoint_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError):
        configure(tmp_path)
