"""Many of Triton's kernels compiled at the same time, before the first of them runs.

Knows what a kernel needs before it can be launched: its code, and in some versions of Triton a launcher in C. Does not
know which kernels there are.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from qvl.kernels.compilers import compilers

_compiling: ContextVar[bool] = ContextVar("qvl_compiling", default=False)


def is_compiling() -> bool:
    """Whether launches compute nothing now."""
    return _compiling.get()


@contextmanager
def compiling_together() -> Iterator[None]:
    """Inside, launches compute nothing; their kernels are compiled at the same time, and ready at the end.

    A first start would spend most of its time compiling one after the other. What cannot be compiled says so when it is
    launched. Where this Triton has no such mode, nothing is different inside.
    """
    mode = getattr(triton_module(), "AsyncCompileMode", None)
    if mode is None:
        yield
        return
    with Compiling() as threads, mode(threads, ignore_errors=True):
        token = _compiling.set(True)
        try:
            yield
        finally:
            _compiling.reset(token)


class Compiling(ThreadPoolExecutor):
    """What Triton hands its compilations to: here a kernel is then loaded at once, which Triton would do much later.

    Its launcher belongs to that: in some versions a run of the C compiler for every signature, several tenths of a
    second, and the kernels of a step come to their first launch one after the other.
    """

    def __init__(self) -> None:
        super().__init__(os.cpu_count(), "qvl-compile", on_this_device())
        compilers()  # Triton tells them of each kernel from here on

    def submit(self, compile_kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        beside = compilers()
        job = None if beside is None else beside.heard()

        def compile_and_load() -> Any:
            if beside is not None and job is not None:
                beside.compile(job)  # now it is found on disk
            return loaded(compile_kernel(*args, **kwargs))

        # One that cannot be loaded is not kept: it says so when it is launched.
        return super().submit(compile_and_load)


def on_this_device() -> Callable[[], None]:
    """What makes this thread's GPU that of another one too."""
    if not torch.cuda.is_initialized():
        return lambda: None
    return functools.partial(torch.cuda.set_device, torch.cuda.current_device())


def loaded(kernel: Any) -> Any:
    """A compiled kernel, on the device and with its launcher: Triton makes both when `run` is first asked for."""
    getattr(kernel, "run")  # noqa: B009  # for what it does
    return kernel


def triton_module() -> ModuleType | None:
    """Triton, where it is installed."""
    try:
        return importlib.import_module("triton")
    except ImportError:
        return None
