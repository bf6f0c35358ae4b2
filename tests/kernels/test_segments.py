"""Attention inside segments against each segment alone, and which kernel is taken where."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from qvl.kernels.segments import MANY, Segments, describe_segments, preferred_order, segment_attention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    lengths = [4, 4, 6, 2, 2]
    q, k, v = (torch.randn(18, 3, 8) for _ in range(3))
    out = segment_attention(q, k, v, Segments.of(lengths, CPU, torch.float32, None))
    alone = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in segment)).transpose(0, 1).flatten(1)
        for segment in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    ]
    assert torch.allclose(out, torch.cat(alone), atol=1e-6)


def test_neighbours_of_one_length_are_one_group() -> None:
    assert Segments.of([4, 4, 6, 2, 2], CPU, torch.float32, None).groups == [(0, 2, 4), (8, 1, 6), (14, 2, 2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_many_groups_go_through_one_kernel() -> None:
    torch.manual_seed(0)
    lengths = [100 + 4 * i for i in range(MANY + 2)]
    q, k, v = (torch.randn(sum(lengths), 4, 80, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    capability = torch.cuda.get_device_capability()
    many = Segments.of(lengths, CUDA, torch.bfloat16, capability)
    assert many.bounds is not None
    with preferred_order(torch.bfloat16, capability):
        one_by_one = segment_attention(q, k, v, Segments(many.groups, None, many.longest))
    out = segment_attention(q, k, v, many)
    exact = segment_attention(q.float(), k.float(), v.float(), Segments(many.groups, None, many.longest))
    assert (out - exact).norm() < 1e-2 * exact.norm()
    assert (one_by_one - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize(
    ("capability", "words", "cudnn"),
    [
        ((7, 5), "memory-efficient kernel", False),
        ((8, 0), "FlashAttention-2 (torch)", False),
        ((8, 6), "FlashAttention-2", False),
        ((8, 9), "FlashAttention-2", False),
        ((9, 0), "cuDNN", True),
        ((10, 0), "cuDNN", True),
        ((12, 0), "FlashAttention-2", False),
    ],
)
def test_every_compute_capability_has_a_kernel(capability: tuple[int, int], words: str, cudnn: bool) -> None:
    assert words in describe_segments(torch.float16, CUDA, capability)
    assert isinstance(preferred_order(torch.float16, capability), contextlib.nullcontext) != cudnn
    assert describe_segments(torch.float32, CPU, None) == "torch SDPA"
