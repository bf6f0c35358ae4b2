"""How TMA, the unit that fetches tiles by itself from compute capability 9.0 on, is told of memory.

Knows boxes of tensors. Does not know what is in them. Importing this file imports Triton.
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


meet = getattr(gl, "thread_barrier", None) or gl.barrier  # of a team's warps; it has another name from Triton 3.7 on

KINDS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def described(x: Tensor, *boxes: tuple[int, ...]) -> tuple[Described, ...]:
    """How boxes of a tensor are fetched; each has a size for every dimension."""
    return _described(x.data_ptr(), x.dtype, x.shape, x.stride(), boxes)


@functools.lru_cache(1024)
def _described(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    boxes: tuple[tuple[int, ...], ...],
) -> tuple[Described, ...]:
    """Kept by all that it says: the layers of a model come again and again with the same memory."""
    place = Place(address, dtype)
    return tuple(
        Described(
            TensorDescriptor(place, list(shape), list(strides), list(box), layout_of(box, dtype)), f"{dtype} {box}"
        )
        for box in boxes
    )


def layout_of(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a box lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(box), KINDS[dtype])
