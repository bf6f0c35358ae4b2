"""Numbers and pixels to the device and back without waiting for it: few copies, from and to page-locked memory.

A copy out of ordinary memory may wait until the device has done everything before it. Knows bytes. Does not know steps.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.pixels import Pixels, copy_pixels

ALIGNMENT = 8
_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


def upload(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Arrays of any shapes (int64, int32 or float32), end to end in one buffer, copied in one go; views of it.

    On a CPU each by itself, which is quicker than to cut a buffer.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.array(array, order="C")) for array in arrays]
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


class SharedMemory:
    """Memory of other processes, which a GPU reads by itself once it is page-locked.

    The driver is asked, not torch: a refusal of the runtime's would be the next kernel's error.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked: set[int] = set()

    def add(self, memory: Pixels) -> None:
        """Takes some milliseconds. What cannot be locked is copied later, piece by piece."""
        address = memory.ctypes.data
        if self._device.type == "cuda" and self._ask("cuMemHostRegister_v2", address, memory.nbytes, 0):
            self._locked.add(address)

    def remove(self, memory: Pixels) -> None:
        """Before it goes; waits for copies that are under way."""
        address = memory.ctypes.data
        if address in self._locked:
            self._locked.remove(address)
            self._ask("cuMemHostUnregister", address)

    def _ask(self, name: str, address: int, *numbers: int) -> bool:
        torch.cuda.synchronize(self._device)  # there is a context then, and no copy
        sizes = [ctypes.c_size_t(number) for number in numbers]
        try:
            return bool(getattr(ctypes.CDLL("libcuda.so.1"), name)(ctypes.c_void_p(address), *sizes) == 0)
        except (OSError, AttributeError):  # it has another name there
            return False


_being_read: deque[tuple[torch.cuda.Event, Tensor]] = deque()


def on_device(pixels: Pixels, device: torch.device) -> Tensor:
    """A copy on a GPU, made without waiting for what the GPU does: out of page-locked memory, or by way of it."""
    if device.type != "cuda":
        return tensor_of(pixels)
    while _being_read and _being_read[0][0].query():  # type: ignore[no-untyped-call]
        _being_read.popleft()
    if pixels.flags.writeable and (host := torch.from_numpy(pixels)).is_pinned():
        return _straight(host, device)
    host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    copy_pixels(pixels, host.numpy())
    return host.to(device, non_blocking=True)


def _straight(host: Tensor, device: torch.device) -> Tensor:
    """Out of memory that its owner writes to again as soon as nobody has it here: not before the GPU has read it."""
    there = host.to(device, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    _being_read.append((event, host))
    return there


def tensor_of(pixels: Pixels) -> Tensor:
    """uint8 [frames, h, w, 3] without a copy where the array is writable (torch warns about others)."""
    return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
