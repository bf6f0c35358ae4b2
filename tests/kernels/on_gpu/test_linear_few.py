"""The kernel for 2 to 64 rows: compiled anywhere, its numbers on a GPU, and how weights are cut."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.kernels import few_rows, gpu
from qvl.kernels.few_rows import MOST
from qvl.kernels.gpu import HOPPER, KIB, capability_of, shared_memory
from qvl.kernels.sums import finished
from tests.kernels.driver import driver

__all__ = ["driver"]

linear_few = pytest.importorskip("qvl.kernels.on_gpu.linear_few", reason="Triton is not installed")

CUDA = torch.device("cuda")
# [n, k] of the family's matrices, whole and split over GPUs, and whether gate and up lie in it.
SHAPES = [
    (2048, 1536, False), (1536, 1536, False), (17920, 1536, True), (1536, 8960, False),
    (4608, 3584, False), (3584, 3584, False), (37888, 3584, True), (3584, 18944, False), (152064, 3584, False),
    (1152, 3584, False), (3584, 896, False), (9472, 3584, True), (3584, 4736, False),
    (10240, 8192, False), (8192, 29568, False), (59136, 8192, True),
]  # fmt: skip
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or capability_of(CUDA) != HOPPER, reason="no GPU of compute capability 9.0"
)


@pytest.mark.parametrize("tokens", [8, 16, 32, MOST])
@pytest.mark.parametrize(("n", "k", "gated"), SHAPES)
def test_cuts_cover_the_matrices_of_the_family(n: int, k: int, gated: bool, tokens: int) -> None:
    assert linear_few.takes(torch.empty(n, k, device="meta"), gated)
    cut = linear_few.cut_for(n // 2 if gated else n, k, tokens, gated)
    assert k % cut.depth == 0
    assert k // cut.depth >= cut.splits
    assert not gated or (cut.boxes, cut.splits) == (2, 1)
    programs = n // (linear_few.BOX * cut.boxes) * cut.splits
    assert cut.splits == 1 or programs <= linear_few.PROGRAMS
    assert n % (linear_few.BOX * cut.boxes) == 0
    bytes_of_a_stage = (cut.boxes * linear_few.BOX + tokens) * cut.depth * 2
    assert cut.stages * bytes_of_a_stage + KIB <= shared_memory(HOPPER)


@pytest.mark.parametrize(("n", "k", "gated"), [(100, 256, False), (192, 256, True), (128, 200, False)])
def test_matrices_that_boxes_do_not_cover_are_not_taken(n: int, k: int, gated: bool) -> None:
    assert not linear_few.takes(torch.empty(n, k), gated)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 16, 32, 64])
def test_it_builds_for_the_gpu_it_is_written_for(
    monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    compiled: list[Any] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        constants["launch_pdl"] = constants["EARLY"]
        compiled.append(kernel.warmup(*gpu.as_triton_takes(arguments), grid=grid, **constants))

    monkeypatch.setattr(linear_few, "launch", compile_only)
    x, weight = torch.zeros(rows, 512, dtype=dtype), torch.zeros(256, 512, dtype=dtype)
    linear_few.product(x, weight, torch.zeros(256, dtype=dtype))
    linear_few.gated_product(x, weight)
    for kernel in compiled:
        assert kernel.metadata.shared + KIB <= shared_memory(HOPPER)
        ptx = kernel.asm["ptx"]
        assert "wgmma.mma_async" in ptx
        fetch = ptx.index("cp.async.bulk.tensor")  # weights before what the kernel in front writes
        assert ptx.index("griddepcontrol.launch_dependents") < fetch < ptx.index("griddepcontrol.wait")
        assert ptx.index("griddepcontrol.wait") < ptx.index("st.global")
        assert re.search(r"\bSTL\b", kernel.asm["sass"]) is None
    assert len(compiled) == 2


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 7, 8, 33, 64])
@pytest.mark.parametrize(("n", "k"), [(256, 256), (1536, 8960), (4608, 3584)])
def test_products(n: int, k: int, rows: int, dtype: torch.dtype) -> None:
    """What lies behind the last row is not a number."""
    torch.manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=CUDA)

    room, weight, bias = numbers(rows + 70, k), numbers(n, k) * 0.02, numbers(n)
    room[rows:] = float("nan")
    x = room[:rows]
    exact = F.linear(x.float(), weight.float())
    gate, up = exact.chunk(2, dim=1)
    for out, right in (
        (linear_few.product(x, weight), exact),
        (linear_few.product(x, weight, bias), exact + bias.float()),
        (linear_few.gated_product(x, weight), F.silu(gate) * up),
    ):
        error = float((finished(out).float() - right).norm() / right.norm())
        assert error < (5e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.gpu
@on_hopper
def test_the_same_again_one_after_the_other() -> None:
    """Each reads what the one before it wrote, and may begin before that has ended."""
    cut = linear_few.Cut(1, 1, 128, 3)
    torch.manual_seed(0)
    weights = [torch.randn(512, 512, dtype=torch.bfloat16, device=CUDA) / 512**0.5 for _ in range(20)]
    x = torch.randn(16, 512, dtype=torch.bfloat16, device=CUDA)

    def chain() -> Tensor:
        out = x
        for weight in weights:
            out = linear_few.product(out, weight, None, cut).parts[0]
        return out

    first = chain()
    exact = x.float()
    for weight in weights:
        exact = F.linear(exact, weight.float())
    assert float((first.float() - exact).norm() / exact.norm()) < 3e-2
    assert all(torch.equal(chain(), first) for _ in range(20))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_trial_passes(dtype: torch.dtype) -> None:
    assert linear_few.problem_of(CUDA, dtype) is None
    assert few_rows.few_rows(CUDA, dtype) is linear_few
