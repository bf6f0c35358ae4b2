"""Programs in CUDA: compiled once, kept, told why not; what a launch is given. With a compiler that pretends."""

from __future__ import annotations

import ctypes
import enum
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qvl.kernels.cuda_program import Arguments, CudaError, Program, compiled


class Status(enum.IntEnum):
    SUCCESS = 0
    ERROR_COMPILATION = 6


class Compiler(ModuleType):
    """As `cuda.bindings.nvrtc`; code is its source, backwards."""

    def __init__(self) -> None:
        super().__init__("cuda.bindings.nvrtc")
        self.version = 13, 0
        self.compiled: list[bytes] = []
        self.says = b""
        self.open = 0

    def nvrtcVersion(self) -> tuple[Status, int, int]:
        return (Status.SUCCESS, *self.version)

    def nvrtcCreateProgram(self, source: bytes, name: bytes, *headers: Any) -> tuple[Status, bytes]:
        self.open += 1
        return Status.SUCCESS, source

    def nvrtcCompileProgram(self, source: bytes, count: int, options: list[bytes]) -> tuple[Status]:
        assert count == len(options)
        assert b"--gpu-architecture=sm_90a" in options
        self.compiled.append(source)
        return (Status.ERROR_COMPILATION if self.says else Status.SUCCESS,)

    def nvrtcGetProgramLogSize(self, source: bytes) -> tuple[Status, int]:
        return Status.SUCCESS, len(self.says)

    def nvrtcGetProgramLog(self, source: bytes, to: bytearray) -> tuple[Status]:
        to[:] = self.says
        return (Status.SUCCESS,)

    def nvrtcGetCUBINSize(self, source: bytes) -> tuple[Status, int]:
        return Status.SUCCESS, len(source)

    def nvrtcGetCUBIN(self, source: bytes, to: bytearray) -> tuple[Status]:
        to[:] = source[::-1]
        return (Status.SUCCESS,)

    def nvrtcDestroyProgram(self, source: bytes) -> tuple[Status]:
        self.open -= 1
        return (Status.SUCCESS,)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    pretends = Compiler()
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", pretends)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return pretends


def test_a_program_is_compiled_once_for_each_source_and_compiler(compiler: Compiler, tmp_path: Path) -> None:
    for source in ("abc", "abc", "xyz", "abc"):
        assert compiled(source, "name") == source[::-1].encode()
    assert compiler.compiled == [b"abc", b"xyz"]
    compiler.version = 13, 1
    compiled("abc", "name")
    assert compiler.compiled == [b"abc", b"xyz", b"abc"]
    assert sorted(path.suffix for path in (tmp_path / "qvl" / "kernels").iterdir()) == [".cubin"] * 3


def test_without_a_folder_it_is_compiled_each_time(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "nowhere/in/particular")
    for _ in range(2):
        assert compiled("abc", "name") == b"cba"
    assert compiler.compiled == [b"abc", b"abc"]


def test_what_the_compiler_says_is_told_and_nothing_is_kept(compiler: Compiler, tmp_path: Path) -> None:
    compiler.says = b"name.cu(1): warning: so what\nname.cu(2): error: expected a ;\n1 error detected\0"
    for _ in range(2):
        with pytest.raises(CudaError, match=r"^name\.cu\(2\): error: expected a ;$"):
            compiled("abc", "name")
    assert list((tmp_path / "qvl" / "kernels").iterdir()) == []
    assert compiler.open == 0


def test_without_the_bindings_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings.nvrtc", raising=False)
    with pytest.raises(CudaError, match="cuda-bindings cannot be imported"):
        compiled("abc", "name")


class Driver(ModuleType):
    """As `cuda.bindings.driver`."""

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        super().__init__("cuda.bindings.driver")
        self.seen: list[tuple[Any, ...]] = []
        self.answer = Status.SUCCESS

    def cuModuleLoadData(self, code: bytes) -> tuple[Status, bytes]:
        return Status.SUCCESS, code

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Status, bytes]:
        return Status.SUCCESS, name

    def cuFuncSetAttribute(self, function: bytes, attribute: int, value: int) -> tuple[Status]:
        self.seen.append((function, attribute, value))
        return (Status.SUCCESS,)

    def cuLaunchKernel(self, *told: Any) -> tuple[Status]:
        pointers = (ctypes.c_void_p * 2).from_address(told[9])
        number = ctypes.c_int.from_address(pointers[0] or 0).value
        self.seen.append((*told[:9], number, ctypes.string_at(pointers[1] or 0, 4), told[10]))
        return (self.answer,)


def test_a_launch_gives_the_driver_what_it_takes(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    pretends = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", pretends)
    program = Program(b"code", "attend", 512, 90_000)
    arguments = Arguments(ctypes.c_int(7), ctypes.create_string_buffer(b"abc"))
    program.launch(132, 5, arguments)
    assert pretends.seen == [
        (b"attend", 8, 90_000),
        (b"attend", 132, 1, 1, 512, 1, 1, 90_000, 5, 7, b"abc\0", 0),
    ]
    pretends.answer = Status.ERROR_COMPILATION
    with pytest.raises(CudaError, match="Status ERROR_COMPILATION"):
        program.launch(132, 5, arguments)
