"""Products of many rows with the activation behind them, for compute capability 9.0, in Gluon.

One program stays on each multiprocessor and takes tile after tile: 128 rows by 256 columns. One warp fetches by TMA;
two teams of four warps multiply 64 rows each with the same part of the weights. Their sums stay in registers, so that
the activation costs no way through memory: of gate and up a tile holds 128 columns each, and half as much is written.

Knows tensors. Does not know layers. Importing this file imports Triton; `qvl.kernels.linear` does so only where such a
GPU is.
"""

from __future__ import annotations

import functools
import heapq
from typing import Any

import numpy as np
import numpy.typing as npt
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

from qvl.kernels.gpu import cdiv, compiling_together, launch
from qvl.kernels.on_gpu.boxes import described
from qvl.kernels.segments import uploaded

ROWS = 64  # of a team
TEAMS = gl.constexpr(2)
COLUMNS = 256  # of a tile, which are rows of the weight
DEPTH = 64  # numbers of a row that are fetched at a time
STAGES = 3  # places for what is fetched
REGISTERS = 168  # of a thread at the start; then those that multiply take those of the one that fetches
SILU, QUICK_GELU = 1, 2
ALONE = 0.6  # how long a team takes for its rows of a tile where the other has none
MOST_COLUMNS = gl.constexpr(4096)  # tiles' columns of a weight
NO_TILE = -1
WRONG = 2e-2  # relative error; bfloat16 leaves a few thousandths


def silu_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [n, in], weight [2 * size, in]: silu(x times the first half) * (x times the second half), [n, size]."""
    return product(x, weight, None, SILU)


def quick_gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [n, in], weight [size, in]: quick_gelu(x times weight + bias), [n, size]."""
    return product(x, weight, bias, QUICK_GELU)


def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: int, stages: int = STAGES) -> Tensor:
    halves = 2 if activation == SILU else 1
    size = len(weight) // halves
    out = x.new_empty(len(x), size)
    columns = COLUMNS // halves
    dealt = dealt_on(cdiv(len(x), ROWS), cdiv(size, columns), x.device)
    launch(
        _product, (dealt.shape[1],),
        *described(x, (ROWS, DEPTH)),
        *described(weight.view(halves, size, -1), (halves, columns, DEPTH)),
        *described(out, (ROWS, columns)),
        dealt, out if bias is None else bias, len(dealt), size, x.shape[1],
        ACTIVATION=activation, STAGES=stages, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
    return out


@functools.lru_cache(1024)
def dealt_on(height: int, columns: int, device: torch.device) -> Tensor:
    """`deal` for the programs that run there at a time, on the device."""
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return uploaded(deal(height, columns, programs), device)


def deal(height: int, columns: int, programs: int) -> npt.NDArray[np.int32]:
    """Which tiles each program computes, one after the other: int32 [turns, programs].

    `height` and `columns` are those of the result, in rows of a team and columns of a tile. Those of a column are
    neighbours, as they read the same weights; who is free first takes the next. When few are left for the last turn,
    two programs share each.
    """
    first = np.arange(0, height, 2)
    tiles = told_of(first[None, :], np.arange(columns)[:, None], first[None, :] + 1 < height).ravel()
    left = len(tiles) % programs
    if height % 2 == 0 and 2 * left <= programs:
        whole, last = np.split(tiles, [len(tiles) - left])
        lower = last - 1  # of the two teams' rows those of the first alone
        tiles = np.concatenate((whole, np.stack((lower, lower + told_of(1, 0, 0)), axis=1).ravel()))
    free = [(0.0, program) for program in range(programs)]
    hands: list[list[int]] = [[] for _ in free]
    for tile in tiles.tolist():
        at, program = free[0]
        heapq.heapreplace(free, (at + (1.0 if tile % 2 else ALONE), program))
        hands[program].append(tile)
    dealt = np.full((max(map(len, hands)), programs), NO_TILE, dtype=np.int32)
    for program, hand in enumerate(hands):
        dealt[: len(hand), program] = hand
    return dealt


def told_of(row: Any, column: Any, both: Any) -> Any:
    """A tile as one number: its first row, its column, and whether both teams have rows of it."""
    return (row * MOST_COLUMNS.value + column) * 2 + both


def problem_of(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, or None: two tiles of rows, one of them for one team, and several of columns.

    What is right is computed on the CPU: a GPU would load dozens of torch's kernels for it, which takes seconds.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((150, 208), (288, 208), (288,)))
    product = x.float() @ weight.float().T
    gate, up = product.chunk(2, 1)
    wide = product + bias.float()

    def run() -> list[tuple[Tensor, Tensor]]:
        given = [tensor.to(device) for tensor in (x, weight, bias)]
        joined = silu_product(*given[:2]), torch.nn.functional.silu(gate) * up
        return [joined, (quick_gelu_product(*given), wide * torch.sigmoid(1.702 * wide))]

    with compiling_together():
        run()
    for out, exact in run():
        error = float((out.cpu().float() - exact).norm() / exact.norm())
        if error > WRONG:
            return f"the kernel for products of many rows is wrong by {error:.1%}"
    return None


@gluon.jit
def _tile(dealt_ptr, i, turns):
    """The tile of this program's turn i; none behind the last turn."""
    told = gl.load(dealt_ptr + i * gl.num_programs(0) + gl.program_id(0), mask=i < turns, other=-1)
    return told // 2 // MOST_COLUMNS, told // 2 % MOST_COLUMNS, gl.where(told < 0, 0, told % 2 + 1)


@gluon.jit
def _fetch(x_box, w_box, dealt_ptr, turns, depth, x, w, full, empty, STAGES: gl.constexpr):
    """The parts of both that a tile needs, as their places become free."""
    ROWS: gl.constexpr = x.shape[1]
    DEPTH: gl.constexpr = x.shape[2]
    COLUMNS: gl.constexpr = w.shape[2]
    ONE: gl.constexpr = (ROWS + w.shape[1] * COLUMNS) * DEPTH * 2
    n = 0
    for i in range(turns):
        row, column, teams = _tile(dealt_ptr, i, turns)
        if teams > 0:
            for k in range(0, depth, DEPTH):
                at = n % STAGES
                mbarrier.wait(empty.index(at), (n // STAGES & 1) ^ 1)
                # Everything counts, also what lies behind the last row and comes as zeros.
                mbarrier.expect(full.index(at), ONE, pred=teams == 1)
                mbarrier.expect(full.index(at), ONE + ROWS * DEPTH * 2, pred=teams > 1)
                tma.async_copy_global_to_shared(w_box, [0, column * COLUMNS, k], full.index(at), w.index(at))
                for team in gl.static_range(TEAMS):
                    tma.async_copy_global_to_shared(
                        x_box, [(row + team) * ROWS, k], full.index(at), x.index(at * TEAMS + team), pred=team < teams
                    )
                n += 1


@gluon.jit
def _multiply(
    out_box, dealt_ptr, bias_ptr, turns, size, depth, x, w, out, full, empty,
    TEAM: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A team: its rows of every tile."""
    ROWS: gl.constexpr = x.shape[1]
    DEPTH: gl.constexpr = x.shape[2]
    COLUMNS: gl.constexpr = w.shape[2]
    ALL: gl.constexpr = w.shape[1] * COLUMNS
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ALL, 16])
    n = 0
    next_row, next_column, next_teams = _tile(dealt_ptr, 0, turns)
    for i in range(turns):
        row, column, teams = next_row, next_column, next_teams
        next_row, next_column, next_teams = _tile(dealt_ptr, i + 1, turns)
        if teams > TEAM:
            acc = gl.zeros((ROWS, ALL), gl.float32, L)
            if ACTIVATION == 2:  # long before it is added, so that nobody waits for memory then
                columns = column * COLUMNS + gl.arange(0, ALL, gl.SliceLayout(0, L))
                bias = gl.load(bias_ptr + columns, mask=columns < size, other=0.0)
            for k in range(0, depth, DEPTH):
                at = n % STAGES
                mbarrier.wait(full.index(at), n // STAGES & 1)
                part = w.index(at).reshape([ALL, DEPTH]).permute((1, 0))
                under_way = warpgroup_mma(x.index(at * TEAMS + TEAM), part, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(under_way,))
                # The product before this one is done: what it read may be overwritten.
                mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES), pred=k > 0)
                n += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((n + STAGES - 1) % STAGES))
            if ACTIVATION == 1:
                done = _silu_and_mul(acc)
            else:
                done = _quick_gelu(acc * 0.5 + (bias.to(gl.float32) * 0.5)[None, :])
            _write(out_box, done, (row + TEAM) * ROWS, column * COLUMNS, out)
        elif teams > 0:
            for _ in range(0, depth, DEPTH):
                mbarrier.wait(full.index(n % STAGES), n // STAGES & 1)
                mbarrier.arrive(empty.index(n % STAGES))
                n += 1
    tma.store_wait(0)


@gluon.jit
def _silu_and_mul(x):
    """silu(left half) * right half."""
    gate, up = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
    half = gate * 0.5
    return _times_sigmoid(half, half) * up


@gluon.jit
def _quick_gelu(half):
    """Of twice the numbers."""
    return _times_sigmoid(half, half * 1.702)


@gluon.jit
def _times_sigmoid(x, z):
    """2 * x * sigmoid(2 * z), by the one instruction that there is for tanh; a sigmoid is wrong by 2 ** -12 at most."""
    return x * _tanh(z) + x


@gluon.jit
def _tanh(x):
    return gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


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


@gluon.jit(do_not_specialize=["turns"])
def _product(
    x_box,  # [rows, depth]
    w_box,  # [1 or 2, size, depth]
    out_box,  # [rows, size]
    dealt_ptr,  # int32 [turns, programs]
    bias_ptr,  # [size]
    turns,
    size,
    depth,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor."""
    x = _places(x_box, STAGES * TEAMS)
    w = _places(w_box, STAGES)
    out = _places(out_box, TEAMS)
    full = _barriers(STAGES, 1)
    empty = _barriers(STAGES, TEAMS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out_box, dealt_ptr, bias_ptr, turns, size, depth, x, w, out.index(0), full, empty,
                         0, ACTIVATION, STAGES)),
            (_multiply, (out_box, dealt_ptr, bias_ptr, turns, size, depth, x, w, out.index(1), full, empty,
                         1, ACTIVATION, STAGES)),
            (_fetch, (x_box, w_box, dealt_ptr, turns, depth, x, w, full, empty, STAGES)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # and their registers; the first takes the others
    )  # fmt: skip
