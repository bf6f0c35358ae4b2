"""What a GPU is to this package: whether Triton's kernels run on it, and how large their tiles may be there.

Knows compute capabilities, how to find out once that a kernel builds and runs, and how to say once why not and what it
costs. Does not know what the kernels compute.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from qvl.kernels.compiling import compiling_together as compiling_together
from qvl.kernels.compiling import is_compiling
from qvl.kernels.triton_cache import settle_cache

logger = logging.getLogger(__name__)

Capability = tuple[int, int]

COST = "torch's own operations are used instead: several times slower per token"
BF16_FROM: Capability = (8, 0)
HOPPER: Capability = (9, 0)  # kernels in Gluon are written for this one's tensor cores
OLDEST: Capability = (7, 5)  # before it torch's own wheels do not run either
KIB = 1024


@dataclass(frozen=True, slots=True)
class Tiles:
    """How the attention kernel is cut on one kind of GPU.

    Of prefill: `rows` query rows (tokens x heads that share a KV head) against `block` keys a turn; `stages` turns of
    keys are under way at a time. `early`: a kernel may start while the one before it ends (programmatic dependent
    launch). Without `tensor_cores` that Triton can use, prefill is left to torch.
    """

    rows: int
    block: int
    warps: int
    stages: int
    decode_block: int
    decode_warps: int
    decode_stages: int
    tensor_cores: bool
    early: bool

    def decode_rows(self, group: int) -> int:
        """Query heads of one KV head, filled up to what a tensor core takes."""
        most = 1 << (group - 1).bit_length()
        return max(16, most) if self.tensor_cores else most


def shared_memory(capability: Capability) -> int:
    """Bytes of shared memory that one program may take."""
    if capability < (8, 0):
        return 64 * KIB
    if capability in ((8, 0), (8, 7)):
        return 163 * KIB
    if capability[0] in (9, 10, 11):
        return 227 * KIB
    return 99 * KIB  # 8.6, 8.9, 12.x, and whatever comes


def tiles_for(capability: Capability, dtype: torch.dtype, head_dim: int) -> Tiles:
    """The tiles that fit; `tests/kernels/test_compile.py` compiles every one of them."""
    if capability < (8, 0) or dtype == torch.float32:
        # Triton multiplies on tensor cores from 8.0 on, and never in full fp32.
        return Tiles(0, 0, 0, 1, decode_block=16, decode_warps=4, decode_stages=1, tensor_cores=False, early=False)
    block = 32 if head_dim > 128 else 64
    early = early_on(capability)
    if shared_memory(capability) < 128 * KIB:
        rows, warps, stages = 64, 4, 2
        decode = (block, 4, 2)
    elif capability < (9, 0):
        rows, warps, stages = 128, 8, 2
        decode = (block, 4, 2)
    else:  # two programs share a multiprocessor: one multiplies while the other takes exponentials
        rows, warps, stages = 64, 4, 3
        decode = (block // 2, 2, 4)
    return Tiles(rows, block, warps, stages, *decode, tensor_cores=True, early=early)


def early_on(capability: Capability | None) -> bool:
    """Whether a kernel can start there while the one before it ends."""
    return capability is not None and (9, 0) <= capability < (12, 0)


@dataclass(frozen=True, slots=True)
class Described:
    """A description of a tensor for Triton, and all of it that a kernel is compiled for, in words."""

    descriptor: Any
    kind: str


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a Triton kernel, or only compile it inside `compiling_together`.

    A kernel that is EARLY may start while the one before it ends; it must wait for that end before it reads or writes
    what the one before it writes or reads. Triton finds out anew at every call which of its compilations fits, in 30 to
    150 microseconds; here that is done once for every kind of call.
    """
    if constants.get("EARLY"):
        constants["launch_pdl"] = True
    if is_compiling():
        kernel.warmup(*as_triton_takes(arguments), grid=grid, **constants)
        return
    kind, values = kind_of(kernel, arguments, constants)
    ready = _launches.get(kind) if kind is not None else None
    if ready is not None:
        ready.run(grid, values)
        return
    compiled = kernel[grid](*as_triton_takes(arguments), **constants)
    names = getattr(kernel, "arg_names", ())[len(arguments) :]
    # Triton's interpreter gives nothing back that could be run again.
    if kind is not None and hasattr(compiled, "run") and all(name in constants for name in names):
        _launches[kind] = Ready(compiled, tuple(constants[name] for name in names))


class Ready:
    """What Triton compiled for one kind of call, and the constants in its order."""

    def __init__(self, compiled: Any, constants: tuple[Any, ...]) -> None:
        self.compiled, self.constants = compiled, constants
        self.driver = importlib.import_module("triton.runtime").driver.active

    def run(self, grid: tuple[int, ...], values: list[Any]) -> None:
        """As Triton does when it has found it; profilers that Triton would tell of every launch hear nothing."""
        compiled, driver = self.compiled, self.driver
        stream = driver.get_current_stream(driver.get_current_device())
        x, y, z = (*grid, 1, 1)[:3]
        told = compiled.function, compiled.packed_metadata, None, None, None
        compiled.run(x, y, z, stream, *told, *values, *self.constants)


# By kind; what was compiled holds its kernel, whose id is part of the kind.
_launches: dict[tuple[Any, ...], Ready] = {}


def as_triton_takes(arguments: tuple[Any, ...]) -> list[Any]:
    return [argument.descriptor if isinstance(argument, Described) else argument for argument in arguments]


def kind_of(
    kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[tuple[Any, ...] | None, list[Any]]:
    """What Triton compiles for, and the arguments with the addresses of tensors.

    That is the dtype of a tensor and whether it lies at a multiple of 16, of an integer whether it is 1, a multiple
    of 16 and within 32 bits, and what a description says of itself. None: there is something else among them.
    """
    kind, values = [id(kernel), *constants, *constants.values()], []
    device = None
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            kind += argument.dtype, not address & 15
            values.append(address)
            if device is None:
                device = argument.get_device()
            continue
        if isinstance(argument, Described):
            kind.append(argument.kind)
            values.append(argument.descriptor)
            continue
        values.append(argument)
        if isinstance(argument, int):
            kind += argument == 1, not argument & 15, -(2**31) <= argument < 2**31
        elif isinstance(argument, float):
            kind.append(float)
        else:
            return None, values
    return (device, *kind), values


def cdiv(count: int, size: int) -> int:
    """Parts of a size that cover the count. (Triton's own takes ten microseconds outside of a kernel.)"""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Triton's own, in no time."""
    return 1 << (count - 1).bit_length()


@functools.cache
def capability_of(device: torch.device) -> Capability | None:
    """(major, minor) of a CUDA device, None elsewhere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def problem_of_trial(name: str, trial: Callable[[], str | None]) -> str | None:
    """Why the kernel of this name cannot be used, or None; `trial` builds and runs it, and gives what is wrong."""
    try:
        return trial()
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    except Exception as error:  # noqa: BLE001  # a compiler, a driver or a linker: each raises what it likes
        return f"{name} did not run ({told(error)})"


def tried_out(module: str, name: str, trial: Callable[[Any], str | None], cost: str) -> Any | None:
    """The module of `qvl.kernels.on_gpu` with the kernel of this name, or None where it cannot be used, told once."""

    def found() -> Any:
        return importlib.import_module(f"qvl.kernels.on_gpu.{module}")

    problem = problem_of_trial(name, lambda: trial(found()))
    if problem is None:
        return found()
    warn_of(problem, cost)
    return None


@functools.cache
def gpu_problem() -> str | None:
    """Why Triton kernels cannot run on the current CUDA device, or None when they can. Warns once."""
    problem = problem_of_trial("a first kernel", first_kernel)
    return None if problem is None else warn_of(problem)


def first_kernel() -> str | None:
    settle_cache()
    from qvl.kernels.on_gpu import ops

    x = torch.ones(2, 16, device="cuda")
    for _ in range(2):  # compiled, and then launched again as what was compiled
        if not torch.allclose(ops.quick_gelu(x.clone()), x * torch.sigmoid(1.702 * x)):
            return "a first kernel gave wrong numbers"
    return None


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """`qvl.kernels.on_gpu.ops` when it can be used."""
    if gpu_problem() is not None:
        return None
    from qvl.kernels.on_gpu import ops

    return ops


def told(error: BaseException) -> str:
    """An error of a compiler or a driver in one line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


@functools.cache
def warn_of(reason: str, cost: str = COST) -> str:
    """Tell the operator once; gives the reason back."""
    logger.warning("no GPU kernels: %s; %s", reason, cost)
    return reason
