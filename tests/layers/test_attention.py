"""The paged cache's memory."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import pytest
import torch

from qvl.layers.attention import KVCache, make_kv_cache
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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pieces_are_the_memory_of_all_layers(checkpoint: Path, device: str) -> None:
    spec = load_spec(checkpoint).text
    cache = make_kv_cache(spec, 7, 16, torch.bfloat16, device)
    shape = (7, 16, spec.num_kv_heads, spec.head_dim)
    assert all(piece.shape[-4:] == shape for piece in cache.pieces)
    assert sum(piece.numel() for piece in cache.pieces) == 2 * spec.num_layers * math.prod(shape)


@pytest.mark.parametrize("in_one_piece", [False, True])
def test_a_block_is_copied_in_every_layer(in_one_piece: bool) -> None:
    layers = torch.randn(3, 2, 5, 16, 2, 8)
    before = layers.clone()
    pairs = [(layer[0], layer[1]) for layer in layers]
    cache = KVCache(pairs, [layers] if in_one_piece else [tensor for pair in pairs for tensor in pair])
    cache.copy_block(4, 1)
    assert torch.equal(layers[:, :, 1], before[:, :, 4])
    assert torch.equal(layers[:, :, [0, 2, 3, 4]], before[:, :, [0, 2, 3, 4]])
