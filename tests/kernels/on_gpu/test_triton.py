"""The Triton kernels against torch: on a GPU where there is one, else in Triton's interpreter in a process of its own.

The interpreter has to be chosen before Triton is imported, which other tests of the same process may do.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import fused
from qvl.kernels.fp8 import FP8, Rounded, round_rows
from qvl.kernels.gpu import Tiles
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import Heads, cut_prompts
from tests.kernels.interpreted import DEVICE, INTERPRETED, ON_GPU, here, run_in_the_interpreter
from tests.kernels.steps import a_step
from tests.models import oracle
from tests.models.pages import Pages

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

pytestmark = pytest.mark.gpu if ON_GPU else []


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests of this file run here")
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def close(out: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return bool((out.double() - exact.double()).norm() <= ROUNDING[dtype] * exact.double().norm())


def wide(rounded: Rounded) -> Tensor:
    return rounded.codes.float() * rounded.scales


# --- attention -------------------------------------------------------------------------------------------------------

TILES = Tiles(
    rows=32, block=16, warps=4, stages=2, decode_block=16, decode_warps=2, decode_stages=2, tensor_cores=True,
    early=False,
)  # fmt: skip


def triton_attention(heads: Heads, tiles: Tiles = TILES, multiprocessors: int = 8) -> Any:
    from qvl.kernels.on_gpu.paged_attention import TritonAttention

    return TritonAttention(heads, tiles, multiprocessors)


def some_angles(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    half = (torch.rand(rows, 1, dim // 2) * 6).repeat(1, 1, 2).to(DEVICE)
    return half.cos(), half.sin()


@here
@pytest.mark.parametrize(
    ("heads", "query", "context", "page"),
    [
        (Heads(14, 2, 32), [1, 1, 1, 9, 3], [300, 1, 33, 20, 3], 16),  # seven to one, as in the 7B
        (Heads(6, 1, 16), [1], [1500], 4),  # one sequence in more parts than are joined at a time
        (Heads(4, 4, 16), [1, 1, 1], [5, 16, 17], 16),  # each in one part
        (Heads(8, 1, 16), [40], [40], 16),
        (Heads(7, 1, 16), [21], [75], 4),  # a chunk behind a prefix, and rows that no head fills
    ],
)
@pytest.mark.parametrize("tensor_cores", [True, False])
def test_attention(heads: Heads, query: list[int], context: list[int], page: int, tensor_cores: bool) -> None:
    step, blocks = a_step(query, context, page, DEVICE)
    dtype = torch.bfloat16 if ON_GPU and tensor_cores else torch.float32
    qkv = numbers(sum(query), (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, dtype=dtype)
    angles = some_angles(sum(query), heads.head_dim)
    shape = (blocks, page, heads.num_kv_heads, heads.head_dim)
    ours = (numbers(*shape, dtype=dtype), numbers(*shape, dtype=dtype))
    theirs = (ours[0].clone(), ours[1].clone())
    tiles = replace(TILES, tensor_cores=tensor_cores)
    attention, gather = triton_attention(heads, tiles), GatherAttention()
    out = attention.run(qkv, angles, ours, attention.plan(step))
    exact = gather.run(qkv.clone(), angles, theirs, gather.plan(step))
    assert close(out, exact, dtype)
    for cache, other in zip(ours, theirs, strict=True):
        assert close(cache, other, dtype)


@here
def test_padded_rows_store_nothing_and_give_zeros() -> None:
    """What a CUDA graph's bucket holds besides its requests; the host's lengths are upper bounds that nobody reads."""
    heads = Heads(4, 2, 16)
    step, blocks = a_step([1, 1, 1], [400, 7, 1], 4, DEVICE)
    step.seq_lens[2], step.slot_mapping[2] = 0, -1
    step.context_lens = [10_000] * 3
    qkv, angles = numbers(3, 8 * 16), some_angles(3, 16)
    kv = (numbers(blocks, 4, 2, 16), numbers(blocks, 4, 2, 16))
    before = (kv[0].clone(), kv[1].clone())
    attention = triton_attention(heads)
    out = attention.run(qkv, angles, kv, attention.plan(step))
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    for new, old in zip(kv, before, strict=True):
        changed = (new != old).flatten(2).any(-1).flatten().nonzero().flatten()
        assert sorted(changed.tolist()) == sorted(step.slot_mapping[:2].tolist())
    alone, _ = a_step([1], [1], 4, DEVICE)
    alone.seq_lens, alone.block_table = step.seq_lens[1:2], step.block_table[1:2]
    alone.slot_mapping, alone.context_lens = step.slot_mapping[1:2], [7]
    gather = GatherAttention()
    exact = gather.run(qkv[1:2].clone(), (angles[0][1:2], angles[1][1:2]), before, gather.plan(alone))
    assert close(out[1], exact[0], torch.float32)


@here
def test_empty_rows_of_decodes_leave_those_of_prompts_alone() -> None:
    """A recorded step: it has room for three decodes, one is there, and prompts begin in the row behind it."""
    heads, query, context = Heads(4, 2, 16), [1, 9], [40, 20]
    step, blocks = a_step(query, context, 4, DEVICE)
    kv = numbers(blocks, 4, 2, 16), numbers(blocks, 4, 2, 16)
    qkv, angles = numbers(10, 8 * 16), some_angles(10, 16)
    gather = GatherAttention()
    exact = gather.run(qkv.clone(), angles, (kv[0].clone(), kv[1].clone()), gather.plan(step))
    attention = triton_attention(heads)
    tiles = cut_prompts(query, context, 1, attention.tile_tokens)
    tiles[:, 0] += 2
    recorded = replace(
        step,
        seq_lens=torch.tensor([40, 0, 0, 20], dtype=torch.int32, device=DEVICE),
        block_table=step.block_table[[0, 0, 0, 1]],
        query_lens=[1] * 3,
        context_lens=[10_000] * 3,
        num_decodes=3,
        prompt_tiles=torch.from_numpy(np.concatenate([tiles, np.zeros_like(tiles)])).to(DEVICE),
    )
    assert close(attention.run(qkv, angles, kv, attention.plan(recorded)), exact, torch.float32)


@here
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [64, 0, 1, 3000],
        [330] * 9,
        [32_000, 1, 0, 1],
        [0],
        [1500, 1499, 1501],
        [40] * 20 + [2000] * 20,  # many, of which each has an end
        [16_000] + [300] * 30,
    ],
)
def test_every_key_of_every_decode_is_in_one_item(lengths: list[int]) -> None:
    """And those of a sequence are about equally long, one behind the other."""
    attention = triton_attention(Heads(4, 2, 16))
    cut = attention.cut(torch.tensor(lengths, dtype=torch.int32, device=DEVICE), len(lengths))
    seen: dict[int, list[list[int]]] = {i: [] for i in range(len(lengths))}
    for number, (seq, *item, parts) in enumerate(cut.items.tolist()):
        assert 0 <= seq < len(lengths)
        if parts:
            seen[seq].append([number, *item, parts])
    joins = cut.joins.tolist()
    for seq, length in enumerate(lengths):
        ends = [0, *(stop for _, _, stop, _ in seen[seq])]
        assert ends[-1] == length
        first, parts = joins[seq]
        assert parts == len(seen[seq])
        for i, item in enumerate(seen[seq]):
            assert item == [first + i, ends[i], ends[i + 1], parts]
            assert length / parts <= ends[1] < length / parts + TILES.decode_block
    assert not cut.arrived.any()


@here
@pytest.mark.parametrize("count", [12, 24])  # joined by a kernel behind, and by the last program of each
def test_few_long_contexts_among_many_short_ones(count: int) -> None:
    """Twice, as two layers do: what counted the parts of the first is ready for the second."""
    heads, lengths = Heads(3, 1, 16), [3] * (count - 2) + [900, 300]
    step, blocks = a_step([1] * count, lengths, 16, DEVICE)
    kv, qkv = (numbers(blocks, 16, 1, 16), numbers(blocks, 16, 1, 16)), numbers(count, 5 * 16)
    angles = some_angles(count, 16)
    tiles = replace(TILES, decode_block=64)  # some in every part, the last not full
    attention, gather = triton_attention(heads, tiles, multiprocessors=4), GatherAttention()
    plan = attention.plan(step)
    assert plan.decodes.joins[-2:, 1].min() > 1 and int((plan.decodes.joins[:, 1] > 1).sum()) == 2
    exact = gather.run(qkv.clone(), angles, (kv[0].clone(), kv[1].clone()), gather.plan(step))
    for _ in range(2):
        assert close(attention.run(qkv.clone(), angles, kv, plan), exact, torch.float32)
    assert not plan.decodes.arrived.any()


# --- between the products ---------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norm_gate_and_gelu(dtype: torch.dtype) -> None:
    from qvl.kernels.on_gpu import ops

    x, residual, weight = numbers(3, 100, dtype=dtype), numbers(3, 100, dtype=dtype), numbers(100, dtype=dtype)
    total = x.double() + residual.double()
    out, new = ops.add_rms_norm(x, residual.clone(), weight, 1e-5)
    assert close(new, total, dtype)
    assert close(out, F.rms_norm(total, (100,), weight.double(), 1e-5), dtype)
    out, same = ops.add_rms_norm(x, None, weight, 1e-5)
    assert same is x
    assert close(out, F.rms_norm(x.double(), (100,), weight.double(), 1e-5), dtype)
    gate_up = numbers(2, 2 * 1030, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert close(ops.silu_and_mul(gate_up), F.silu(gate) * up, dtype)
    gelu = gate_up.double() * torch.sigmoid(1.702 * gate_up.double())
    assert close(ops.quick_gelu(gate_up), gelu, dtype)


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_of_a_sum(dtype: torch.dtype) -> None:
    from qvl.kernels.on_gpu import ops

    x, delta, weight, bias = (numbers(*shape, dtype=dtype) for shape in ((3, 100), (3, 100), (100,), (100,)))
    x += 3  # so that the mean matters
    total = x + delta
    exact = F.layer_norm(total.double(), (100,), weight.double(), bias.double(), 1e-6)
    into = torch.empty_like(x)
    assert ops.add_layer_norm(x, delta, weight, bias, 1e-6, into) is into
    assert close(into, exact, dtype)
    assert close(x, total, dtype)
    before = x.clone()
    assert close(ops.add_layer_norm(x, None, weight, bias, 1e-6), exact, dtype)
    assert torch.equal(x, before)


@here
def test_rotation_of_a_view_in_place() -> None:
    from qvl.kernels.on_gpu import ops

    qkv, (cos, sin) = numbers(5, 3, 4, 20), some_angles(5, 20)
    before = qkv.clone()
    expected = [fused.rotate(before[:, i].clone().cpu(), cos.cpu(), sin.cpu()) for i in range(2)]
    for i in range(2):
        assert close(ops.rotate(qkv[:, i], cos, sin).cpu(), expected[i], torch.float32)
    assert close(qkv[:, 1].cpu(), expected[1], torch.float32)
    assert torch.equal(qkv[:, 2], before[:, 2])
    both = ops.rotate(before[:, :2].flatten(1, 2).clone(), cos, sin, scaled=4, scale=0.3).cpu()
    assert close(both, torch.cat((expected[0] * 0.3, expected[1]), dim=1), torch.float32)


@here
def test_fp8_rows_are_those_of_torch() -> None:
    from qvl.kernels.on_gpu import ops

    if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    x = numbers(4, 96)
    x[1] *= 1e4
    x[2] = 0
    ours = ops.round_rows(x)
    theirs = round_rows(x.cpu())
    assert ours.codes.dtype == FP8
    assert torch.allclose(ours.scales.cpu(), theirs.scales)
    # A tie may fall to the other side, and what is almost zero to zero.
    near = (wide(ours).cpu() - wide(theirs)).abs() <= 0.07 * wide(theirs).abs() + 0.01 * theirs.scales
    if INTERPRETED:  # which forgets to carry when it rounds up to a power of two
        near |= wide(ours) * 2 == wide(theirs)
    assert near.all()
    weight = numbers(96)
    norm, _ = ops.add_rms_norm(x, None, weight, 1e-5, eight_bits=True)
    exact = F.rms_norm(x, (96,), weight, 1e-5)
    assert isinstance(norm, Rounded)
    assert (wide(norm) - exact).norm() < (0.2 if INTERPRETED else 0.04) * exact.norm()


@here
@pytest.mark.parametrize("size", [104, 4096 + 40])  # numbers of a row, which goes in pieces of 4,096
def test_a_gate_in_fp8(size: int) -> None:
    from qvl.kernels.on_gpu import ops

    if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    gate_up = numbers(3, 2 * size, dtype=torch.bfloat16)
    gate_up[1] = 0
    gated = ops.silu_and_mul(gate_up, eight_bits=True)
    assert isinstance(gated, Rounded)
    gate, up = gate_up.float().chunk(2, dim=1)
    exact = F.silu(gate) * up
    largest = exact.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert torch.allclose(gated.scales * 448, largest, rtol=1e-2)
    assert (wide(gated) - exact).norm() < (0.2 if INTERPRETED else 0.05) * exact.norm()


# --- products of one row ----------------------------------------------------------------------------------------------


@here
@pytest.mark.parametrize("programs", [19, 4, None], ids=["a group each", "in turns", "as chosen"])
@pytest.mark.parametrize("width", [64, 528])
def test_products_with_all_that_surrounds_them(programs: int | None, width: int) -> None:
    """Whole rows of the weights at a time, in turns or not, and a row in parts."""
    from qvl.kernels.on_gpu import linear_row

    shape = None if programs is None else linear_row.Shape(rows=2, block=512, warps=2, programs=programs)
    if width > 512 and programs == 4:
        pytest.skip("rows in parts take a program for each group")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, weight, norm = numbers(1, width, dtype=dtype), numbers(38, width, dtype=dtype), numbers(width, dtype=dtype)
    bias, residual = numbers(38, dtype=dtype), numbers(1, 38, dtype=dtype)
    plain = x.double() @ weight.double().T
    normed = F.rms_norm(x.double(), (width,), norm.double(), 1e-5) @ weight.double().T
    out = linear_row.product(x, weight, bias=bias, residual=residual, shape=shape)
    assert close(out, plain + bias.double() + residual.double(), dtype)
    out = linear_row.product(x, weight, norm=norm, eps=1e-5, bias=bias, shape=shape)
    assert close(out, normed + bias.double(), dtype)
    gate, up = normed.chunk(2, dim=1)
    assert close(linear_row.product(x, weight, norm=norm, eps=1e-5, gated=True, shape=shape), F.silu(gate) * up, dtype)


@here
@pytest.mark.parametrize("rows", [37, 1])
@pytest.mark.parametrize("width", [96, 4112])
def test_a_last_group_that_is_not_full(rows: int, width: int) -> None:
    from qvl.kernels.on_gpu import linear_row

    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, weight, bias = numbers(1, width, dtype=dtype), numbers(rows, width, dtype=dtype), numbers(rows, dtype=dtype)
    exact = x.double() @ weight.double().T + bias.double()
    assert close(linear_row.product(x, weight, bias=bias), exact, dtype)


@here
@pytest.mark.parametrize("width", [96, 4112])
def test_products_with_fp8_weights(width: int) -> None:
    from qvl.kernels.on_gpu import linear_row

    if ON_GPU and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    x, held = numbers(1, width, dtype=dtype), round_rows(numbers(24, width))
    exact = x.double() @ wide(held).double().T
    scales = held.scales.flatten()
    assert close(linear_row.product(x, held.codes, scales=scales), exact, dtype)
    gate, up = exact.chunk(2, dim=1)
    assert close(linear_row.product(x, held.codes, scales=scales, gated=True), F.silu(gate) * up, dtype)


@here
def test_the_trial_of_products_passes() -> None:
    from qvl.kernels.on_gpu import linear_row

    assert linear_row.problem_of(DEVICE, torch.bfloat16 if ON_GPU else torch.float32, early=False) is None


# --- all of them in a network -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU the engine's own tests run the network")
@torch.inference_mode()
def test_a_network_with_these_kernels(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many rows and a decode of one, against the network with the kernels of a CPU."""
    from qvl.kernels.on_gpu import linear_row
    from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration

    network, rows = oracle.load_ours(checkpoint), 18
    hidden = network.embed(torch.randint(0, 500, (rows,)))
    positions = torch.arange(rows).expand(3, rows) + torch.tensor([[0], [3], [7]])
    exact = network.logits(Pages(network, 1).step([(0, hidden, positions)])[0])
    text = network.spec.text
    monkeypatch.setattr(network, "attention", triton_attention(Heads(text.num_heads, text.num_kv_heads, text.head_dim)))
    monkeypatch.setattr(
        Qwen2VLForConditionalGeneration,
        "one_row_kernels",
        lambda self, x: linear_row if len(x) == 1 else None,
    )
    pages = Pages(network, 1)
    out = [pages.step([(0, hidden[part], positions[:, part])])[0] for part in (slice(0, -1), slice(rows - 1, None))]
    assert [len(part) for part in out] == [rows - 1, 1]
    assert oracle.relative_error(network.logits(torch.cat(out)), exact) < 1e-4
