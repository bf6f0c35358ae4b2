"""Programs in CUDA, compiled by NVRTC when first used and kept in the user's cache folder.

torch's wheels for GPUs bring NVRTC, and NVIDIA's bindings for it and the driver, which are imported here alone and only
when asked for. Knows source, code and how to launch it. Does not know what it computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import tempfile
from pathlib import Path
from typing import Any

from qvl.kernels.native import cache_folder

OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")


class CudaError(Exception):
    """What NVRTC or the driver says."""


def compiled(source: str, name: str) -> bytes:
    """The code of a program, from the cache when source and compiler are the same."""
    nvrtc = bindings("nvrtc")
    version = asked(nvrtc.nvrtcVersion())
    folder = cache_folder()
    if folder is None:
        return compile_now(nvrtc, source, name)
    told = "\0".join((source, *OPTIONS, str(version)))
    kept = folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.cubin"
    if not kept.exists():
        keep(compile_now(nvrtc, source, name), kept)
    return kept.read_bytes()


def compile_now(nvrtc: Any, source: str, name: str) -> bytes:
    program = asked(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), [option.encode() for option in OPTIONS])[0]
        if int(status):
            said = bytearray(asked(nvrtc.nvrtcGetProgramLogSize(program)))
            asked(nvrtc.nvrtcGetProgramLog(program, said))
            lines = said.rstrip(b"\0").decode(errors="replace").splitlines()
            raise CudaError(next((line for line in lines if "error" in line), f"NVRTC failed: {status}"))
        code = bytearray(asked(nvrtc.nvrtcGetCUBINSize(program)))
        asked(nvrtc.nvrtcGetCUBIN(program, code))
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def keep(code: bytes, path: Path) -> None:
    """Written beside it and renamed, so that processes that start together never read half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / "code"
        written.write_bytes(code)
        os.replace(written, path)


def asked(answer: tuple[Any, ...]) -> Any:
    """What a function of the bindings gives behind its status."""
    if int(answer[0]):
        raise CudaError(f"{type(answer[0]).__name__} {answer[0].name}")
    return answer[1] if len(answer) == 2 else answer[1:]


class Program:
    """One function of a program on the current device, with so many threads and bytes of shared memory a block."""

    def __init__(self, code: bytes, function: str, threads: int, shared: int) -> None:
        self.driver = bindings("driver")
        self._module = asked(self.driver.cuModuleLoadData(code))
        self._function = asked(self.driver.cuModuleGetFunction(self._module, function.encode()))
        self._threads, self._shared = threads, shared
        most = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        asked(self.driver.cuFuncSetAttribute(self._function, most, shared))

    def launch(self, blocks: int, stream: int, arguments: Arguments) -> None:
        asked(
            self.driver.cuLaunchKernel(
                self._function, blocks, 1, 1, self._threads, 1, 1, self._shared, stream, arguments.address, 0
            )
        )


class Arguments:
    """Arguments of a kernel as the driver takes them; they are read when it is launched, or recorded."""

    def __init__(self, *values: ctypes._SimpleCData[Any] | ctypes.Array[Any]) -> None:
        self._values = values
        self._pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        self.address = ctypes.addressof(self._pointers)


def bindings(name: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise CudaError(f"NVIDIA's cuda-bindings cannot be imported ({error})") from None
