"""Every paged attention against attention written out, and how decoding sequences are grouped."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels.on_cpu import paged_attention as cpu_attention
from qvl.kernels.sdpa import MAX_PADDING, GatherAttention, causal_lower_right, group_by_length
from qvl.layers.attention import AttentionMetadata, PagedAttention
from tests.kernels.compiled import skip_without_compiler
from tests.kernels.steps import a_step


def metadata(query: list[int], context: list[int], block_size: int) -> AttentionMetadata:
    """Sequences whose blocks lie scattered in a cache; table entries past the end point anywhere."""
    return a_step(query, context, block_size, generator=torch.Generator().manual_seed(3))[0]


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [m, heads, d] are the last m of k, v [n, kv_heads, d]: [m, heads * d]."""
    (m, heads, dim), n = q.shape, k.shape[0]
    out = torch.empty(m, heads, dim)
    for i in range(m):
        for h in range(heads):
            kv = h // (heads // k.shape[1])
            seen = n - m + i + 1
            weights = (k[:seen, kv] @ q[i, h] / math.sqrt(dim)).softmax(0)
            out[i, h] = weights @ v[:seen, kv]
    return out.flatten(1)


@pytest.fixture(params=["gather", "cpu"])
def attention(request: pytest.FixtureRequest) -> PagedAttention:
    if request.param == "gather":
        return GatherAttention()
    chosen = cpu_attention.choose(16)
    if chosen is None:
        skip_without_compiler()
    return chosen[0]


def unturned(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    """Angles of zero."""
    return torch.ones(rows, 1, dim), torch.zeros(rows, 1, dim)


def run_paged(
    attention: PagedAttention,
    query: list[int],
    context: list[int],
    block_size: int,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int, int] = (6, 2, 16),
) -> tuple[Tensor, Tensor]:
    """(paged, written out), both [n, heads * dim], for random sequences of which all but the queries are cached."""
    torch.manual_seed(0)
    heads, kv_heads, dim = shape
    step = metadata(query, context, block_size)
    num_blocks = sum(-(-length // block_size) for length in context)
    cache = tuple(torch.randn(num_blocks, block_size, kv_heads, dim).to(dtype) for _ in range(2))
    keys, values = ([torch.randn(n, kv_heads, dim) for n in context] for _ in range(2))
    for i, (new, length) in enumerate(zip(query, context, strict=True)):
        for pages, own in zip(cache, (keys, values), strict=True):
            for t in range(length - new):  # what earlier steps have stored
                pages[step.block_table[i, t // block_size], t % block_size] = own[i][t].to(dtype)
    q = torch.randn(sum(query), heads, dim)
    qkv = torch.cat((q.flatten(1), *(torch.cat([x[-n:] for x, n in zip(own, query, strict=True)]).flatten(1)
                                     for own in (keys, values))), dim=1)  # fmt: skip
    out = attention.run(qkv, unturned(len(qkv), dim), cache, attention.plan(step))
    keys, values = ([x.to(dtype).float() for x in own] for own in (keys, values))
    expected = [written_out(a, k, v) for a, k, v in zip(q.split(query), keys, values, strict=True)]
    return out, torch.cat(expected)


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(
    ("query", "context"),
    [
        ([1], [1]),
        ([1], [17]),
        ([5], [5]),
        ([5], [23]),
        ([1, 1, 1], [9, 9, 9]),
        ([1, 1, 1, 1], [40, 3, 41, 1]),
        ([1, 1, 6, 16, 2], [12, 30, 6, 21, 33]),
    ],
)
def test_attention_over_pages_equals_attention_written_out(
    attention: PagedAttention, query: list[int], context: list[int], block_size: int
) -> None:
    out, expected = run_paged(attention, query, context, block_size)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_cache_serves_wide_queries(attention: PagedAttention, dtype: torch.dtype) -> None:
    """A compiled kernel, and torch with AMX, round queries of prompts and weights to bf16 where the cache is."""
    out, expected = run_paged(attention, [1, 1, 4], [7, 33, 5], 4, dtype)
    assert out.dtype == torch.float32
    assert torch.allclose(out[:2], expected[:2], atol=1e-5)
    prompt = (out[2:] - expected[2:]).norm() / expected[2:].norm()
    assert prompt < (2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_long_contexts_are_joined_from_their_parts(attention: PagedAttention) -> None:
    out, expected = run_paged(attention, [1, 1, 1], [cpu_attention.SPLIT * 2 + 5, cpu_attention.SPLIT, 3], 16)
    assert torch.allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 16), (2, 2, 48), (4, 1, 64), (10, 2, 80), (7, 1, 128), (16, 2, 512)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_of_any_number_share_keys_of_any_width(
    attention: PagedAttention, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Registers hold a few queries, tokens and numbers at a time; what is over is done by itself."""
    out, expected = run_paged(attention, [1, 1, 1], [5, 39, cpu_attention.SPLIT + 1], 16, dtype, shape)
    assert torch.allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_sequence_breaks_itself_only(attention: PagedAttention, bad: float) -> None:
    step = metadata([1, 1], [5, 6], 4)
    cache = tuple(torch.randn(4, 4, 1, 16) for _ in range(2))
    qkv = torch.randn(2, 48)
    qkv[0, 16] = bad  # the first number of the first key
    qkv[0, 0] = 1.0
    out = attention.run(qkv, unturned(2, 16), cache, attention.plan(step))
    assert out[0].isnan().any()
    assert out[1].isfinite().all()


def test_groups_hold_every_sequence_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 400, (17,), generator=generator).tolist()
        groups = group_by_length(metadata([1] * 17, lengths, 16))
        assert sorted(i for group in groups for i in group) == list(range(17))
        for group in groups:
            own = [lengths[i] for i in group]
            assert own[0] == max(own)
            assert own[0] * len(own) <= MAX_PADDING * sum(own)


def test_queries_and_keys_are_turned_and_values_are_not(attention: PagedAttention) -> None:
    """A turn by one angle everywhere changes no product of a query and a key of the same step, but what is stored."""
    torch.manual_seed(0)
    step = metadata([5], [5], 4)
    qkv, angle = torch.randn(5, 48), torch.rand(1, 1, 8).repeat(5, 1, 2) * 6
    outs, caches = [], []
    for angles in (unturned(5, 16), (angle.cos(), angle.sin())):
        cache = tuple(torch.zeros(2, 4, 1, 16) for _ in range(2))
        outs.append(attention.run(qkv, angles, cache, attention.plan(step)))
        caches.append(cache)
    assert torch.allclose(*outs, atol=1e-5)
    assert not torch.allclose(caches[0][0], caches[1][0], atol=1e-2)
    assert torch.equal(caches[0][1], caches[1][1])


@pytest.mark.parametrize(("chunk", "length"), [(3, 9), (1, 5), (4, 4)])
def test_the_mask_known_by_name_is_the_mask_written_out(chunk: int, length: int) -> None:
    """What GPUs are given instead of a tensor, as torch itself spells it out elsewhere."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, chunk, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    seen = torch.arange(length) <= torch.arange(length - chunk, length)[:, None]
    named = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(chunk, length), enable_gqa=False)
    assert torch.allclose(named, F.scaled_dot_product_attention(q, k, v, attn_mask=seen), atol=1e-6)
