"""The arithmetic of GPU memory: rates out of measurements, sums that fit together, and the 7B added up by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from qvl.bench.shape import write_shape
from qvl.engine.config import DeviceFacts, EngineConfig, EngineOptions, resolve
from qvl.engine.memory import (
    LIBRARIES,
    Own,
    decoder_bytes,
    graph_bytes,
    kept_bytes,
    kv_cache_bytes,
    largest_patches,
    sampling_bytes,
    vision_bytes,
)
from qvl.engine.probe import CONTEXT, DECODES, QUERY, SIDE, StepCost, fit_cost
from qvl.engine.tower_graphs import MOST_PATCHES
from qvl.errors import ConfigError
from tests.engine.harness import make_config

MIB, GIB = 1 << 20, 1 << 30
OURS = Own(tower=True, joined=True)
H200 = DeviceFacts("cuda", (9, 0), int(139.8 * GIB), "float32", 16)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """The 7B in bfloat16 on an H200, with what an engine takes by default but the context of the comparison."""
    folder = write_shape("7b", tmp_path_factory.mktemp("shape") / "7b")
    return resolve(EngineOptions(model=str(folder), load_format="dummy", max_model_len=16384), H200)


def test_the_7b_by_hand(seven: EngineConfig) -> None:
    """docs/performance.md shows this sum."""
    assert seven.weight_bytes / GIB == pytest.approx(15.44, abs=0.01)
    assert seven.spec.kv_bytes_per_token(2) == 2 * 28 * 4 * 128 * 2 == 56 * 1024
    tokens, hidden, wide = seven.max_num_batched_tokens, 3584, 18944
    attention = (hidden + 36 * 128 + 2 * 28 * 128) * 2
    behind = tokens * hidden * 2 + 1152 * 3 * (hidden + wide) * 2
    assert behind < tokens * attention
    assert decoder_bytes(seven) == tokens * (2 * hidden * 2 + 2 * 128 * 4 + attention)
    assert sampling_bytes(seven) == 256 * hidden * 2 + 152064 * (256 * 2 + 32 * 40)
    patches = largest_patches(seven)
    assert patches == 65_536  # a picture of 16,384 tokens
    block = (64 << 20) * 4 // 3 + 4096 * 1280 * 2
    assert vision_bytes(seven, 1 << 15) < vision_bytes(seven, patches)  # though it goes in larger parts
    assert vision_bytes(seven, patches) == patches * (2 * 1280 * 2 + 2 * 80 * 4) + block
    assert vision_bytes(seven, patches, in_place=True) == vision_bytes(seven, patches) - (64 << 20) // 3
    decodes = 256 * (2 * hidden * 2 + 2 * 128 * 4 + hidden * 2) + 256 * 3 * (hidden + wide) * 2 + 256 * 152064 * 2
    apart = 768 * (3 * hidden * 2 + 2 * 128 * 4) + 768 * 3 * (hidden + wide) * 2
    assert decoder_bytes(seven, 768) == apart
    assert graph_bytes(seven) == apart > decodes
    tables, counts = 2 * 256 * 1024 * 4, 256 * 152064 * 2
    kept = tables + counts + apart + 768 * hidden * 2 + 2 * 5 * MIB // 4 + LIBRARIES
    assert kept_bytes(seven) == kept
    tower = 5504 * (3 * 1280 * 2 + 2 * 80 * 4 + (5120 + 1280) * 2)  # stream, norm, added; angles; fc1 and its sum
    assert vision_bytes(seven, 5504, in_place=True) == tower
    assert graph_bytes(seven, Own(tower=True)) == apart > tower  # so graphs of pictures cost no memory of torch's
    assert kept_bytes(seven, Own(tower=True)) == kept + 5504 * 1176 * 2 + 10 * MIB + 24 * 5 * MIB // 4
    joined = 1024 * (3 * hidden * 2 + 2 * 128 * 4) + 1024 * (3 * hidden + wide) * 2
    assert decoder_bytes(seven, 1024, joined=True) == joined
    assert graph_bytes(seven, OURS) == decodes > joined
    two_more = decodes - apart + 256 * hidden * 2 + 2 * 5 * MIB // 4
    assert kept_bytes(seven, OURS) == kept_bytes(seven, Own(tower=True)) + two_more


def test_the_cache_is_as_large_as_the_comparison(seven: EngineConfig) -> None:
    """What 0.9 of an H200 leaves beside weights and what else was measured there: vLLM 0.25.1 has 2,040,016 tokens."""
    usable = int(0.9 * H200.total_memory) - seven.weight_bytes - 530 * MIB
    tokens = kv_cache_bytes(seven, usable, own=OURS) // (56 * 1024)
    assert tokens >= 2_040_016


def test_everything_beside_the_cache_has_its_place(checkpoint: Path) -> None:
    config = make_config(checkpoint, max_num_batched_tokens=512, encoder_cache_memory=1 << 20, num_blocks=256)
    usable = 170 * MIB
    work = max(decoder_bytes(config), sampling_bytes(config), vision_bytes(config, largest_patches(config)))
    rest = work + kept_bytes(config) + (1 << 20)
    assert 0.9 * usable < kv_cache_bytes(config, usable) + rest < usable
    assert kv_cache_bytes(config, usable + MIB) - kv_cache_bytes(config, usable) == MIB
    assert kv_cache_bytes(config, 1 << 50) == config.max_num_seqs * 4096 * (config.block_bytes // 16)
    assert kv_cache_bytes(config, 1 << 20) == 0  # nothing fits: the config says so in words
    with pytest.raises(ConfigError):
        dataclasses.replace(config, num_blocks=None, max_model_len_given=True).with_kv_memory(0)


def test_what_was_measured_counts_where_memory_follows_lengths(checkpoint: Path) -> None:
    config = make_config(checkpoint, max_num_batched_tokens=512, encoder_cache_memory=1 << 20, num_blocks=256)
    cost = StepCost(token=2e4, context=100.0, pair=0.5, decode_context=64.0, patch=3e4)
    usable = 1 << 28
    num_bytes = kv_cache_bytes(config, usable, cost)
    tokens = num_bytes / (config.block_bytes / config.block_size)
    step = max(cost.prefill(512, config.max_model_len), cost.patch * largest_patches(config))
    rest = step + tokens * cost.decode_context + kept_bytes(config) + (1 << 20)
    assert 0.9 * usable < num_bytes + rest < usable


def test_rates_are_recovered_from_measurements() -> None:
    true = StepCost(token=5000.0, context=300.0, pair=7.0, decode_context=450.0, patch=9000.0)
    fitted = fit_cost(
        alone=int(5000 * QUERY),
        behind=int(true.prefill(QUERY, CONTEXT)),
        wider=int(true.prefill(2 * QUERY, CONTEXT)),
        decode=int(DECODES * (5000 + 450 * CONTEXT)),
        picture=9000 * SIDE**2,
    )
    for name in ("token", "context", "pair", "decode_context", "patch"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    small = fit_cost(alone=1000, behind=10, wider=10, decode=1, picture=0)  # noise never gives negative rates
    assert min(small.context, small.pair, small.decode_context, small.patch) == 0


def test_the_largest_picture_is_bounded_by_context_and_processor(checkpoint: Path) -> None:
    config = make_config(checkpoint, encoder_budget_tokens=10, max_model_len=64)
    assert largest_patches(config) == 64 * 4  # the processor allows 64 tokens, the context as many
    assert largest_patches(make_config(checkpoint, encoder_budget_tokens=10, max_model_len=32)) == 32 * 4
    assert largest_patches(make_config(checkpoint, encoder_budget_tokens=500)) == 500 * 4


def test_graphs_of_pictures_may_be_the_largest(checkpoint: Path) -> None:
    config = make_config(checkpoint, max_num_batched_tokens=512, num_blocks=256, max_num_seqs=4)
    assert (
        graph_bytes(config) < vision_bytes(config, MOST_PATCHES, in_place=True) == graph_bytes(config, Own(tower=True))
    )
