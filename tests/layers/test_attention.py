"""The paged cache's memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from qvl.layers.attention import make_kv_cache
from qvl.specs import load_spec


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_cache_is_zeros_of_its_own_that_cost_nothing_until_they_are_used(checkpoint: Path) -> None:
    spec = load_spec(checkpoint).text
    block_bytes = 16 * spec.num_kv_heads * spec.head_dim * 2
    num_blocks = (256 << 20) // (2 * spec.num_layers * block_bytes)
    before = resident_bytes()
    cache = make_kv_cache(spec, num_blocks, 16, torch.bfloat16, "cpu")
    assert resident_bytes() - before < 64 << 20, os.uname().release
    assert len(cache) == spec.num_layers
    tensors = [tensor for pair in cache for tensor in pair]
    assert all(tensor.shape == (num_blocks, 16, spec.num_kv_heads, spec.head_dim) for tensor in tensors)
    tensors[0][-1] = 1.0
    assert (tensors[0][-1] == 1).all() and not tensors[0][:-1].any()
    assert not any(tensor[-1].any() for tensor in tensors[1:])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors), "what kernels may rely on"


def test_a_device_gives_one_piece_of_exactly_its_bytes(checkpoint: Path) -> None:
    spec = load_spec(checkpoint).text
    tensors = [tensor for pair in make_kv_cache(spec, 7, 16, torch.bfloat16, "meta") for tensor in pair]
    assert len(tensors) == 2 * spec.num_layers
    each = 7 * 16 * spec.num_kv_heads * spec.head_dim
    assert [tensor.storage_offset() for tensor in tensors] == [each * i for i in range(len(tensors))]
    assert all(tensor.is_contiguous() and tensor.shape[:2] == (7, 16) for tensor in tensors)
    assert {tensor.untyped_storage().nbytes() for tensor in tensors} == {2 * each * len(tensors)}
