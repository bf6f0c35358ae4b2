"""Attention inside large segments for compute capability 9.0, in CUDA: `attention_pictures.cu` says how it works.

Knows tensors of queries, keys and values, and the text of the products that the source asks for. Small segments go to
the kernel in Gluon. Does not know pictures. Importing this file imports Triton; `qvl.kernels.segments` does so only
where such a GPU is.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qvl.kernels.compiling import is_compiling
from qvl.kernels.cuda_program import Arguments, Program, asked, bindings, compiled
from qvl.kernels.on_gpu import attention_segments
from qvl.kernels.on_gpu.attention_segments import FIELDS as FIELDS
from qvl.kernels.on_gpu.attention_segments import tiles_of as tiles_of

SOURCE = Path(__file__).with_suffix(".cu")
FILES = "hopper.cuh", "attention_shares.cuh", SOURCE.name
WORDS = {torch.bfloat16: "bf16", torch.float16: "f16"}
# As in the source: teams; their query rows, and keys of a turn; turns that are fetched ahead.
TEAMS, KEYS, STAGES = 3, 64, 4
THREADS = 128 * (TEAMS + 1)
LARGE = TEAMS * KEYS  # query rows of a tile
SMALL = 64
DEFAULT_STREAM = 0
FORMS = SMALL, LARGE
NAME = "CUDA; Triton for small ones"
LONG, MIDDLE, ENOUGH = 1536, 1024, 4096  # keys


def rows_for(lengths: Sequence[int]) -> int:
    """Query rows of a tile: large ones where a segment is long, or where there are enough of some length."""
    large = max(lengths) >= LONG or (min(lengths) >= MIDDLE and sum(lengths) >= ENOUGH)
    return LARGE if large else SMALL


def attend_segments(qkv: Tensor, tiles: Tensor, rows: int) -> Tensor:
    """qkv [n, 3, heads, head_dim] contiguous, its queries scaled: [n, heads * head_dim], which is where they lay.
    `tiles` are of so many rows.
    """
    if rows == SMALL:
        return attention_segments.attend_segments(qkv, tiles, rows)
    length, _, heads, dim = qkv.shape
    kernel = kernel_for(dim, qkv.dtype, qkv.get_device())
    flat = qkv.view(length, 3 * heads * dim)
    if not is_compiling():
        kernel.run(qkv, tiles)
    return flat[:, : heads * dim]


@functools.cache
def kernel_for(head_dim: int, dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(head_dim, dtype, device)


class Kernel:
    """The program on one device."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: int) -> None:
        tile = KEYS * 2 * head_dim  # bytes of a turn's keys; beside the values there are 16 columns of ones
        shared = STAGES * (2 * tile + KEYS * 32) + 32 * STAGES + 256  # barriers, and to where a swizzle begins
        self._blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._numbers = 32 * (head_dim // 2 + 6)  # of a warp
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # now the driver has this device for this thread
            self._program = Program(compiled(source_of(head_dim, dtype), SOURCE.stem), "attend", THREADS, shared)

    def run(self, qkv: Tensor, tiles: Tensor) -> None:
        stream = torch.cuda.current_stream(qkv.device).cuda_stream
        sums, states = self._places_on(stream, qkv.device)
        arguments = Arguments(
            box_of(qkv.data_ptr(), qkv.shape, qkv.dtype),
            ctypes.c_void_p(tiles.data_ptr()), ctypes.c_int(tiles.shape[0]), ctypes.c_void_p(qkv.data_ptr()),
            ctypes.c_int(qkv.shape[2]), ctypes.c_void_p(sums.data_ptr()), ctypes.c_void_p(states.data_ptr()),
        )  # fmt: skip
        self._program.launch(self._blocks, stream, arguments)

    def _places_on(self, stream: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where blocks leave sums for each other: launches on other streams may run at the same time. They are made
        when a stream is first used, which is before anything on it is recorded: recordings share their memory. On the
        default stream nothing is ever recorded, so a trial there keeps nothing.
        """
        if stream == DEFAULT_STREAM:
            return self._new_places(device)
        if stream not in self._places:
            assert not torch.cuda.is_current_stream_capturing()
            self._places[stream] = self._new_places(device)
        return self._places[stream]

    def _new_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        warps = (self._blocks - 1) * TEAMS * 4
        sums = torch.empty(warps * self._numbers, device=device)
        return sums, torch.zeros(warps, dtype=torch.int32, device=device)


@functools.lru_cache(1024)
def box_of(address: int, shape: torch.Size, dtype: torch.dtype) -> ctypes.Array[ctypes.c_uint64]:
    """How TMA fetches KEYS rows of a head in strips of 16 columns: a CUtensorMap. Layers come with the same memory."""
    length, three, heads, dim = shape
    cuda, width = bindings("driver"), three * heads * dim * 2
    kind = cuda.CUtensorMapDataType
    box = asked(
        cuda.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            4, address,
            [cuda.cuuint64_t(size) for size in (16, length, dim // 16, three * heads)],
            [cuda.cuuint64_t(size) for size in (width, 32, dim * 2)],
            [cuda.cuuint32_t(size) for size in (16, KEYS, dim // 16, 1)],
            [cuda.cuuint32_t(1)] * 4,
            cuda.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            cuda.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_32B,
            cuda.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            cuda.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return (ctypes.c_uint64 * 16).from_buffer_copy(ctypes.string_at(box.getPtr(), 128))


def source_of(head_dim: int, dtype: torch.dtype) -> str:
    """All of the program for tensors of this kind."""
    word = WORDS[dtype]
    return "\n".join(
        [
            f'#define KIND "{word}"',
            f"constexpr int D = {head_dim}, KEYS = {KEYS};",
            f"constexpr bool HALF = {str(dtype == torch.float16).lower()};",
            wide_product("add_scores", KEYS, word, values=False),
            wide_product("add_values", head_dim + 8, word, values=True),
            *(SOURCE.with_name(name).read_text() for name in FILES),
        ]
    )


def wide_product(name: str, columns: int, word: str, *, values: bool) -> str:
    """A function that adds 64 x 16 from registers times 16 x columns from shared memory, or starts with it (`more` 0).
    Keys lie as columns there, values as rows.
    """
    count = columns // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    told = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    a, b, more = ", ".join(f"%{count + i}" for i in range(4)), f"%{count + 4}", f"%{count + 5}"
    return f"""
__device__ void {name}(float (&d)[{count}], const unsigned* a, unsigned long long b, int more = 1) {{
  asm volatile("{{.reg .pred p; setp.ne.b32 p, {more}, 0;"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{word}.{word} "
               "{{{sums}}}, {{{a}}}, {b}, p, 1, 1, {int(values)};}}"
               : {told}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}}"""
