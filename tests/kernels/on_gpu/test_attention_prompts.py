"""The kernel for prompts: compiled anywhere, its numbers on a GPU, and what it does not take."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.kernels import gpu
from qvl.kernels.gpu import HOPPER, KIB, capability_of, shared_memory, tiles_for
from qvl.kernels.sdpa import GatherAttention
from qvl.layers.attention import Heads, cut_prompts
from tests.kernels.driver import Driver, driver
from tests.kernels.steps import a_step

__all__ = ["driver"]

attention_prompts = pytest.importorskip("qvl.kernels.on_gpu.attention_prompts", reason="Triton is not installed")

CUDA = torch.device("cuda")
SEVEN = Heads(28, 4, 128)
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or capability_of(CUDA) != HOPPER, reason="no GPU of compute capability 9.0"
)


class AlwaysTaken:
    """The kernel, for prompts of every length."""

    ROWS, attend_prompts = attention_prompts.ROWS, staticmethod(attention_prompts.attend_prompts)
    takes = staticmethod(lambda block_size, longest: True)


def attention_with(prompts: Any, heads: Heads = SEVEN) -> Any:
    from qvl.kernels.on_gpu.paged_attention import TritonAttention

    return TritonAttention(heads, tiles_for(HOPPER, torch.bfloat16, 128), 132, prompts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_fits_and_keeps_its_numbers_in_registers(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    compiled: list[Any] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        assert grid == (4 * 3,)
        compiled.append(kernel.warmup(*gpu.as_triton_takes(arguments), grid=grid, **constants))

    monkeypatch.setattr(attention_prompts, "launch", compile_only)
    q, kv = torch.zeros(40, 28, 128, dtype=dtype), torch.zeros(2, 5, 16, 4, 128, dtype=dtype)
    work = torch.zeros(3, 4, dtype=torch.int32)
    attention_prompts.attend_prompts(q, (kv[0], kv[1]), torch.zeros(1, 5, dtype=torch.int32), work, q, SEVEN)
    (kernel,) = compiled
    assert kernel.metadata.shared + KIB <= shared_memory(HOPPER)
    assert 32 * kernel.metadata.num_warps * attention_prompts.REGISTERS <= 64 * KIB
    ptx = kernel.asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    assert "setmaxnreg" in ptx
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")
    assert re.search(r"\bSTL\b", kernel.asm["sass"]) is None


@pytest.mark.parametrize(
    ("block_size", "taken"), [(16, True), (8, True), (128, True), (4, False), (24, False), (256, False)]
)
def test_which_blocks_it_takes(block_size: int, taken: bool) -> None:
    assert attention_prompts.takes(block_size, attention_prompts.LONG) is taken
    assert not attention_prompts.takes(block_size, attention_prompts.LONG - 1)


def test_long_prompts_go_to_it_in_its_own_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from qvl.kernels.on_gpu import paged_attention

    went: list[tuple[str, int]] = []

    def ours(q: Tensor, kv: Any, table: Tensor, work: Tensor, out: Tensor, heads: Heads) -> None:
        went.append(("prompts", int(work[:, 2].max())))

    def other(q: Tensor, kv: Any, table: Tensor, work: Tensor, out: Tensor, heads: Heads, tiles: gpu.Tiles) -> None:
        went.append(("other", int(work[:, 2].max())))

    monkeypatch.setattr(paged_attention, "attend_prefills", other)
    attention = attention_with(SimpleNamespace(ROWS=128, takes=attention_prompts.takes, attend_prompts=ours))
    small, large = 64 // 7, 128 // 7
    for context, page, recorded, wanted in (
        ([100, 1024], 16, False, ("prompts", large)),
        ([100, 1023], 16, False, ("other", small)),
        ([100, 1024], 24, False, ("other", small)),  # blocks that it does not take
        ([100, 1024], 16, True, ("other", small)),
    ):
        step, blocks = a_step([50, 60], context, page, num_decodes=0)
        if recorded:
            tiles = cut_prompts(step.query_lens, step.context_lens, 0, attention.tile_tokens)
            step.prompt_tiles = torch.from_numpy(tiles)
        q, cache = torch.zeros(110, 28, 128), torch.zeros(blocks, page, 4, 128)
        attention.attend(q, (cache, cache), attention.plan(step))
        assert went.pop() == wanted
    assert not went


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [8, 16, 128])
def test_scores_far_above_those_of_the_last_keys_are_right(page: int, dtype: torch.dtype) -> None:
    """The kernel shifts all exponentials of a row by the largest score of its last keys, with which it begins."""
    torch.manual_seed(0)
    query, context = [300, 40], [1000, 700]
    step, blocks = a_step(query, context, page, CUDA, num_decodes=0)
    q = torch.randn(340, 28, 128, device=CUDA, dtype=dtype)
    k, v = (torch.randn(blocks, page, 4, 128, device=CUDA, dtype=dtype) for _ in range(2))
    k[step.block_table[0, 0].long()] *= 100
    exact, at = [], 0
    for seq, (count, length) in enumerate(zip(query, context, strict=True)):
        table = step.block_table[seq, : -(-length // page)].long()
        keys, values = (x[table].flatten(0, 1)[:length].float().transpose(0, 1) for x in (k, v))
        seen = torch.arange(length, device=CUDA)[None] <= torch.arange(length - count, length, device=CUDA)[:, None]
        part = q[at : at + count].float().view(count, 4, 7, 128).permute(1, 2, 0, 3)
        scores = (part @ keys[:, None].transpose(2, 3) * 128**-0.5).masked_fill(~seen, -torch.inf)
        exact.append((scores.softmax(-1) @ values[:, None]).permute(2, 0, 1, 3).flatten(1, 2))
        at += count
    work = torch.from_numpy(cut_prompts(query, context, 0, 128 // 7)).to(CUDA)
    out = torch.empty_like(q)
    attention_prompts.attend_prompts(q, (k, v), step.block_table, work, out, SEVEN)
    together = torch.cat(exact)
    assert float((out.float() - together).norm() / together.norm()) < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [SEVEN, Heads(12, 2, 128), Heads(8, 8, 128)])
@pytest.mark.parametrize(
    ("query", "context"),
    [
        ([1], [1]),
        ([5, 20, 147], [5, 50, 147]),  # of less than a turn of keys, behind a prefix, of two turns
        ([300, 128, 64], [2000, 128, 129]),
        ([1424], [1424]),
    ],
)
def test_prompts(heads: Heads, query: list[int], context: list[int], dtype: torch.dtype) -> None:
    """What lies behind a sequence's last key is not a number, and some tiles are none."""
    torch.manual_seed(0)
    step, blocks = a_step(query, context, 16, CUDA, num_decodes=0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=CUDA)

    qkv = numbers(sum(query), (heads.num_heads + 2 * heads.num_kv_heads) * 128)
    half = torch.rand(len(qkv), 1, 64, device=CUDA).repeat(1, 1, 2) * 6
    angles = half.cos(), half.sin()
    k, v = (numbers(blocks, 16, heads.num_kv_heads, 128) for _ in range(2))
    gather = GatherAttention()
    exact = gather.run(qkv.float(), angles, (k.float(), v.float()), gather.plan(step))
    for seq, length in enumerate(context):
        if length % 16:
            block = step.block_table[seq, length // 16].long()
            k[block, length % 16 :] = v[block, length % 16 :] = float("nan")
    attention = attention_with(AlwaysTaken, heads)
    plan = attention.plan(step)
    plan.prefills = torch.cat((plan.prefills, torch.zeros(3, 4, dtype=torch.int32, device=CUDA)))
    out = attention.run(qkv, angles, (k, v), plan)
    assert float((out.float() - exact).norm() / exact.norm()) < 1e-2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("kernel", [AlwaysTaken, None])
@pytest.mark.parametrize("answers", [3, 40])  # parts joined by a kernel of its own, and by the last program of each
def test_answers_beside_prompts_in_a_graph(answers: int, kernel: Any) -> None:
    """Neither waits for the other, and whoever comes next waits for both."""
    torch.manual_seed(0)
    query, context = [1] * answers + [200, 90], [1700] * answers + [1300, 90]
    step, blocks = a_step(query, context, 16, CUDA)
    dtype, rows = torch.bfloat16, sum(query)
    k, v = (torch.randn(blocks, 16, 4, 128, device=CUDA, dtype=dtype) for _ in range(2))
    half = torch.rand(rows, 1, 64, device=CUDA).repeat(1, 1, 2) * 6
    angles = half.cos(), half.sin()
    attention, gather = attention_with(kernel), GatherAttention()
    plan = attention.plan(step)
    qkv = torch.zeros(rows, 36 * 128, device=CUDA, dtype=dtype)

    def layers() -> Tensor:
        return torch.stack([attention.run(qkv, angles, (k, v), plan) + 1 for _ in range(3)])

    layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers()
    for _ in range(5):
        qkv.copy_(torch.randn(qkv.shape, device=CUDA))
        graph.replay()
        exact = gather.run(qkv.float(), angles, (k.float(), v.float()), gather.plan(step))
        for layer in out.float() - 1:
            assert float((layer - exact).norm() / exact.norm()) < 2e-2
