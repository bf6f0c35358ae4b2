"""The device as torch sees it: what `resolve` must know before loading, and what running out of memory looks like.

Knows torch's device interfaces. Does not know models or requests.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from qvl.engine.config import DeviceFacts
from qvl.engine.host_memory import available_host_memory
from qvl.errors import ConfigError
from qvl.kernels.on_cpu.linear_floats import preferred_cpu_dtype

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # `docker run --cpus`: microseconds of processor in each period
NON_BLOCKING = 1  # the default stream does not wait for it, nor it for that
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_facts(device: str = "auto") -> DeviceFacts:
    """Facts about "cpu", "cuda" or, for "auto", a GPU where there is one. Raises `ConfigError` when there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("'device' is 'cuda', but no CUDA GPU was found", param="device")
    num_cores = usable_cores()
    if device == "cpu" or not torch.cuda.is_available():
        dtype, _ = preferred_cpu_dtype()
        return DeviceFacts("cpu", (0, 0), available_host_memory(), str(dtype).removeprefix("torch."), num_cores)
    total = torch.cuda.get_device_properties(0).total_memory
    return DeviceFacts("cuda", torch.cuda.get_device_capability(0), total, "float32", num_cores)


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, a container's share of them, at most OMP_NUM_THREADS.

    Threads beyond that wait for each other: with two on one core's worth of time a token takes ten times as long.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        cores = min(cores, int(asked))
    try:
        quota, _, period = CGROUP_QUOTA.read_text().strip().partition(" ")
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        return cores


@functools.cache
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all work of an engine on this GPU.

    Recorded or not, it all goes there: cuBLAS keeps 32 MiB for each stream, and CUDA records none of its default one.
    Torch makes 32 streams when it is asked for one, which take 66 MiB; so the driver is asked.
    """
    torch.cuda.synchronize(device)  # now there is a context
    handle = ctypes.c_void_p()
    try:
        made = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(handle), NON_BLOCKING) == 0
    except (OSError, AttributeError):  # it has another name there
        made = False
    if not made:
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.cuda.ExternalStream(handle.value, device=device)  # type: ignore[no-untyped-call]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host (where torch has no class of its own for it)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_cached_memory(device: torch.device) -> None:
    """Give back what the caching allocator holds but nobody uses, after an allocation failed."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """ "cpu (2 threads)" or "cuda (NVIDIA H200)": what the ready line shows."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
