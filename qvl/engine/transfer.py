"""Numbers to the device and back without waiting for it: few copies, from and to page-locked memory.

A copy out of ordinary memory may wait until the device has done everything before it. Knows bytes. Does not know steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT = 8
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def upload(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Arrays of any shapes (int64, int32 or float32), end to end in one buffer, copied in one go; views of it."""
    starts = []
    size = 0
    for array in arrays:
        starts.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = host.numpy()
    for array, start in zip(arrays, starts, strict=True):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(_DTYPES[array.dtype]).view(array.shape)
        for array, start in zip(arrays, starts, strict=True)
    ]


def put(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """One array."""
    return upload([array], device)[0]


class Fetch:
    """A copy of a tensor on its way to the host; what happens to the tensor afterwards does not touch it."""

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._host = tensor.clone()

    def wait(self) -> npt.NDArray[np.generic]:
        """The numbers, once they are here. The only place of a step that waits for the device."""
        if self._event is not None:
            self._event.synchronize()
        found: npt.NDArray[np.generic] = self._host.numpy()
        return found
