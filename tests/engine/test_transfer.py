"""Pixels on their way to the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from qvl.backends.room import PIECE_BYTES, PixelRoom
from qvl.engine.pixels import Pixels, Room
from qvl.engine.transfer import SharedMemory, on_device, tensor_of, upload

WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def pixels(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (1, 40, 512, 3), dtype=np.uint8)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_CUDA])])
def test_numbers_arrive_as_they_were(device: str) -> None:
    """Of every type and shape, turned or frozen. What becomes of them there or here afterwards stays there or here."""
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    frozen = np.broadcast_to(np.int64(7), (3, 2))
    arrays: list[npt.NDArray[Any]] = [
        turned,
        frozen,
        np.zeros((0, 3), dtype=np.int64),
        np.array([-1, 2**31 - 1], dtype=np.int32),
    ]
    there = upload(arrays, torch.device(device))
    for array, tensor in zip(arrays, there, strict=True):
        assert tensor.is_contiguous()
        assert tensor.cpu().numpy().dtype == array.dtype
        assert np.array_equal(tensor.cpu().numpy(), array)
    there[1] += 1
    turned[:] = -5
    assert (frozen == 7).all()
    assert there[0].flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_pixels_are_shared_where_they_may_be() -> None:
    array = pixels(1)
    assert tensor_of(array).data_ptr() == array.ctypes.data
    frozen = np.frombuffer(array.tobytes(), np.uint8).reshape(array.shape)
    assert np.array_equal(tensor_of(frozen).numpy(), array)


def test_a_cpu_reads_shared_memory_where_it_is() -> None:
    room = PixelRoom(PIECE_BYTES)
    engines = Room(room.announcement)
    engines.enter()
    shared = SharedMemory(torch.device("cpu"))
    shared.add(engines.memory)
    (file,) = room.hand_over(pixels(2))
    there = on_device(engines.pixels(file), torch.device("cpu"))
    assert np.array_equal(there.numpy(), pixels(2))
    assert room.empty((1,)) is None, "the tensor holds the place"
    del there
    assert room.empty((1,)) is not None
    shared.remove(engines.memory)


@pytest.mark.gpu
@WITHOUT_CUDA
def test_a_gpu_reads_shared_memory_by_itself_until_it_is_removed() -> None:
    """Each place is written again as soon as it is given back, while a busy GPU has far more to do than to read it."""
    device = torch.device("cuda")
    room = PixelRoom(4 * PIECE_BYTES)
    engines = Room(room.announcement)
    engines.enter()
    shared = SharedMemory(device)
    shared.add(engines.memory)
    busy = torch.ones(4096, 4096, device=device)
    arrived = []
    for seed in range(40):
        files = room.hand_over(pixels(seed))
        if not files:  # every place waits for the GPU
            torch.cuda.synchronize()
            on_device(pixels(0), device)  # whatever comes next notices
            files = room.hand_over(pixels(seed))
        busy = busy @ busy
        array = engines.pixels(files[0])
        assert torch.from_numpy(array).is_pinned()
        arrived.append(on_device(array, device))
        del array
    for seed, there in enumerate(arrived):
        assert np.array_equal(there.cpu().numpy(), pixels(seed)), seed
    shared.remove(engines.memory)
    assert not torch.from_numpy(engines.memory).is_pinned()
