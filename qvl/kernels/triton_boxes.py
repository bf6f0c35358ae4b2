"""How TMA, the unit that fetches tiles by itself from compute capability 9.0 on, is told of memory.

Knows boxes of two-dimensional tensors. Does not know what is in them. Importing this file imports Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qvl.kernels.gpu import Described


@dataclass(frozen=True, slots=True)
class Place:
    """What Triton asks of the tensor in a description. A description is kept, and must not keep memory in use."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv}


def described(flat: Tensor, *boxes: tuple[int, int]) -> tuple[Described, ...]:
    """How boxes (rows, columns) of a two-dimensional tensor are fetched."""
    return _described(flat.data_ptr(), flat.dtype, flat.shape, flat.stride(), boxes)


@functools.lru_cache(1024)
def _described(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, int],
    strides: tuple[int, int],
    boxes: tuple[tuple[int, int], ...],
) -> tuple[Described, ...]:
    """Kept by all that it says: the layers of a model come again and again with the same memory."""
    place = Place(address, dtype)
    return tuple(
        Described(
            TensorDescriptor(place, list(shape), list(strides), list(box), layout_of(*box, dtype)), f"{dtype} {box}"
        )
        for box in boxes
    )


def layout_of(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], KINDS[dtype])
