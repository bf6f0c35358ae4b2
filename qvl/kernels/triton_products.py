"""Products of many rows with the activation behind them, for compute capability 9.0, in Gluon.

One program stays on each multiprocessor and takes tile after tile: 128 rows by 256 columns. One warp fetches by TMA;
two teams of four warps multiply 64 rows each with the same part of the weights. Their sums stay in registers, so that
the activation costs no way through memory: of gate and up a tile holds 128 columns each, and half as much is written.

Knows tensors. Does not know layers. Importing this file imports Triton; `qvl.kernels.linear` does so only where such a
GPU is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qvl.kernels.gpu import launch
from qvl.kernels.triton_boxes import described

ROWS = 64  # of a team
TEAMS = gl.constexpr(2)
COLUMNS = 256  # of a tile, which are rows of the weight
WRITTEN = 128  # columns of the result that a team writes at a time
DEPTH = 64  # numbers of a row that are fetched at a time
STAGES = 4  # places for what is fetched
LAG = 1  # turns by which a team is behind the one before: one multiplies while the other applies the activation
REGISTERS = 168  # of a thread at the start; then those that multiply take those of the one that fetches
NONE, SILU, QUICK_GELU = 0, 1, 2
WRONG = 2e-2  # relative error; bfloat16 leaves a few thousandths


def silu_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in], weight [2 * size, in]: silu(x times the first half) * (x times the second half), [n, size]."""
    return product(x, weight, None, SILU)


def quick_gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, in], weight [size, in]: quick_gelu(x times weight + bias), [n, size]."""
    return product(x, weight, bias, QUICK_GELU)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: int,
    *,
    stages: int = STAGES,
    lag: int = LAG,
) -> Tensor:
    halves = 2 if activation == SILU else 1
    size = len(weight) // halves
    out = x.new_empty(len(x), size)
    launch(
        _product, (multiprocessors(x.device),),
        *described(x, (ROWS, DEPTH)),
        *described(weight.view(halves, size, -1), (halves, COLUMNS // halves, DEPTH)),
        *described(out, (ROWS, WRITTEN)),
        out if bias is None else bias, len(x), size, x.shape[1],
        BIAS=bias is not None, ACTIVATION=activation, STAGES=stages, LAG=lag, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def problem_of(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None: two tiles of rows, of which one is not full, and two of columns."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((193, 208), (288, 208)))
    # Computed on the CPU: a GPU would load dozens of torch's kernels for it, which takes seconds.
    gate, up = (x.float() @ weight.float().T).chunk(2, 1)
    exact = torch.nn.functional.silu(gate) * up
    out = silu_product(x.to(device), weight.to(device)).cpu().float()
    error = float((out - exact).norm() / exact.norm())
    return None if error < WRONG else f"the kernel for products of many rows is wrong by {error:.1%}"


@gluon.jit
def _turns(rows, size, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """How many places this program looks at, and how many teams' rows there are.

    Places are counted in teams' rows, column after column, and dealt out as many at a time as there are teams: so much
    a multiprocessor does at a time. A tile begins at every such step of a column; its last one may be smaller, and
    costs less.
    """
    height = gl.cdiv(rows, ROWS)
    steps = gl.cdiv(height * gl.cdiv(size, COLUMNS), TEAMS)
    return TEAMS * gl.cdiv(steps - gl.program_id(0), gl.num_programs(0)), height


@gluon.jit
def _place(i):
    """The place that this program looks at in its turn i."""
    return TEAMS * (gl.program_id(0) + i // TEAMS * gl.num_programs(0)) + i % TEAMS


@gluon.jit
def _fetch(x_box, w_box, rows, size, depth, x, w, full, empty, STAGES: gl.constexpr):
    """The parts of both that a tile needs, as their places become free."""
    ROWS: gl.constexpr = x.shape[1]
    DEPTH: gl.constexpr = x.shape[2]
    COLUMNS: gl.constexpr = w.shape[2]
    turns, height = _turns(rows, size, ROWS, COLUMNS)
    n = 0
    for i in range(turns):
        place = _place(i)
        column = place // height * COLUMNS
        first = place % height
        if (first % TEAMS == 0) & (column < size):
            row = first * ROWS
            for k in range(0, depth, DEPTH):
                at = n % STAGES
                mbarrier.wait(empty.index(at), (n // STAGES & 1) ^ 1)
                # All of it counts, also what lies behind the last row and comes as zeros.
                mbarrier.expect(full.index(at), (TEAMS * ROWS + w.shape[1] * COLUMNS) * DEPTH * 2)
                tma.async_copy_global_to_shared(w_box, [0, column, k], full.index(at), w.index(at))
                for team in gl.static_range(TEAMS):
                    place_of = x.index(at * TEAMS + team)
                    tma.async_copy_global_to_shared(x_box, [row + team * ROWS, k], full.index(at), place_of)
                n += 1


@gluon.jit
def _multiply(
    out_box, bias_ptr, rows, size, depth, x, w, out, full, empty, ready,
    TEAM: gl.constexpr,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    """A team: its rows of every tile."""
    ROWS: gl.constexpr = x.shape[1]
    DEPTH: gl.constexpr = x.shape[2]
    COLUMNS: gl.constexpr = w.shape[2]
    ALL: gl.constexpr = w.shape[1] * COLUMNS
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ALL, 16])
    turns, height = _turns(rows, size, ROWS, COLUMNS)
    lag = gl.minimum(LAG, gl.cdiv(depth, DEPTH))
    n = 0
    for i in range(turns):
        place = _place(i)
        column = place // height * COLUMNS
        first = place % height
        if (first % TEAMS == 0) & (column < size):
            if first + TEAM < height:
                if LAG > 0 and TEAM == 1:
                    mbarrier.wait(ready.index(0), 0, pred=n == 0)
                acc = gl.zeros((ROWS, ALL), gl.float32, L)
                for k in range(0, depth, DEPTH):
                    at = n % STAGES
                    mbarrier.wait(full.index(at), n // STAGES & 1)
                    part = w.index(at).reshape([ALL, DEPTH]).permute((1, 0))
                    under_way = warpgroup_mma(x.index(at * TEAMS + TEAM), part, acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=(under_way,))
                    # The product before this one is done: what it read may be overwritten.
                    mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), pred=k > 0)
                    n += 1
                    if LAG > 0 and TEAM == 0:
                        mbarrier.arrive(ready.index(0), pred=n == lag)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES))
                _finish(out_box, bias_ptr, acc, (first + TEAM) * ROWS, column, size, out, BIAS, ACTIVATION)
            else:
                for _ in range(0, depth, DEPTH):
                    mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                    mbarrier.arrive(empty.index(n % STAGES))
                    n += 1
    tma.store_wait(0)


@gluon.jit
def _finish(out_box, bias_ptr, acc, row, column, size, out, BIAS: gl.constexpr, ACTIVATION: gl.constexpr):
    """What stands behind the product, and the way to memory."""
    WRITTEN: gl.constexpr = out.shape[1]
    if BIAS:
        at = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        acc += gl.load(bias_ptr + at, mask=at < size, other=0.0).to(gl.float32)[None, :]
    left, right = acc.reshape([acc.shape[0], 2, WRITTEN]).permute(0, 2, 1).split()
    if ACTIVATION == 1:
        _write(out_box, _times_sigmoid(left * right, left * -1.4426950408889634), row, column, out)
    elif ACTIVATION == 2:
        _write(out_box, _times_sigmoid(left, left * (-1.702 * 1.4426950408889634)), row, column, out)
        _write(out_box, _times_sigmoid(right, right * (-1.702 * 1.4426950408889634)), row, column + WRITTEN, out)
    else:
        _write(out_box, left, row, column, out)
        _write(out_box, right, row, column + WRITTEN, out)


@gluon.jit
def _times_sigmoid(x, power):
    """x / (1 + 2 ** power), four numbers of a thread with one reciprocal: there are few units for those.

    With more than 30 the fourth power of 2 might leave fp32, and less than a billionth of x is left.
    """
    size: gl.constexpr = x.shape[1]
    e = 1.0 + gl.exp2(gl.minimum(power, 30.0))
    a, b = e.reshape([x.shape[0], size // 2, 2]).split()
    ab = a * b
    one, other = ab.reshape([x.shape[0], size // 16, 2, 4]).permute(0, 1, 3, 2).split()
    both = _reciprocal(one * other)
    inverse = gl.join(both * other, both * one).permute(0, 1, 3, 2).reshape([x.shape[0], size // 2])
    inverse = gl.convert_layout(inverse, ab.type.layout, assert_trivial=True)
    each = gl.join(inverse * b, inverse * a).reshape([x.shape[0], size])
    return x * gl.convert_layout(each, x.type.layout, assert_trivial=True)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _write(out_box, values, row, column, out):
    tma.store_wait(0)
    out.store(values.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_box, [row, column], out)


@gluon.jit
def _places(box, count: gl.constexpr):
    """Shared memory for so many boxes."""
    return gl.allocate_shared_memory(box.dtype, [count] + box.block_shape, box.layout)  # noqa: RUF005


@gluon.jit
def _barriers(count: gl.constexpr, arrivals: gl.constexpr):
    found = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(found.index(i), count=arrivals)
    return found


@gluon.jit(do_not_specialize=["rows"])
def _product(
    x_box,  # [rows, depth]
    w_box,  # [1 or 2, size, depth]
    out_box,  # [rows, size]
    bias_ptr,  # [size]
    rows,
    size,
    depth,
    BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor."""
    x = _places(x_box, STAGES * TEAMS)
    w = _places(w_box, STAGES)
    out = _places(out_box, TEAMS)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, TEAMS)
    ready = _barriers(1, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out_box, bias_ptr, rows, size, depth, x, w, out.index(0), full, empty, ready,
                         0, BIAS, ACTIVATION, STAGES, LAG)),
            (_multiply, (out_box, bias_ptr, rows, size, depth, x, w, out.index(1), full, empty, ready,
                         1, BIAS, ACTIVATION, STAGES, LAG)),
            (_fetch, (x_box, w_box, rows, size, depth, x, w, full, empty, STAGES)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # and their registers; the first takes the others
    )  # fmt: skip
