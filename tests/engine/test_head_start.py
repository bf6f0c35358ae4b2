"""What is begun before it is needed: it helps where it can and never fails a start."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from qvl.engine import head_start
from qvl.engine.start_clock import StartClock
from qvl.kernels import gpu


class Driver:
    """Says `code` to the first call, and notes who was called."""

    def __init__(self, code: int) -> None:
        self.code = code
        self.calls: list[str] = []

    def cuInit(self, flags: int) -> int:
        self.calls.append("init")
        return self.code

    def cuDeviceGet(self, device: object, ordinal: int) -> int:
        self.calls.append(f"device {ordinal}")
        return 0

    def cuDevicePrimaryCtxRetain(self, context: object, device: ctypes.c_int) -> int:
        self.calls.append("context")
        return 0

    def cuCtxPushCurrent_v2(self, context: object) -> int:
        self.calls.append("push")
        return 0

    def cuCtxSetLimit(self, limit: int, value: ctypes.c_size_t) -> int:
        self.calls.append(f"limit {limit} {value.value}")
        return 0

    def cuCtxPopCurrent_v2(self, context: object) -> int:
        self.calls.append("pop")
        return 0


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("qvl-context")]


@pytest.mark.parametrize(
    ("code", "calls"), [(0, ["init", "device 0", "context", "push", "limit 0 256", "pop"]), (100, ["init"])]
)
def test_the_context_is_that_of_the_first_gpu(code: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(code)
    monkeypatch.setenv("CUDA_MODULE_LOADING", "EAGER")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    head_start.begin_context("auto")
    for thread in threads():
        thread.join()
    assert driver.calls == calls


def test_a_cpu_needs_no_driver_and_a_machine_without_one_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> object:
        asked.append(name)
        raise OSError("no such file")

    monkeypatch.setenv("CUDA_MODULE_LOADING", "LAZY")
    monkeypatch.setattr(ctypes, "CDLL", load)
    head_start.begin_context("cpu")
    assert threads() == [] and asked == []
    head_start._retain_context()
    assert asked == ["libcuda.so.1"]


def test_triton_is_made_ready_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(head_start, "_make_driver", lambda: order.append("driver"))
    monkeypatch.setattr(gpu, "gpu_problem", lambda: order.append("kernel"))
    head_start.begin_triton().join()
    try:
        from triton.runtime.cache import triton_key
    except ImportError:
        assert order == []
        return
    assert triton_key.cache_info().currsize == 1 and order == ["driver", "kernel"]


def test_a_driver_that_cannot_be_made_fails_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
    asked: list[str] = []

    class Broken:
        def get_current_device(self) -> int:
            asked.append("device")
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(triton.runtime.driver, "_active", Broken())
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    head_start._make_driver()
    assert asked == ["device"]


def test_the_clock_names_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.5, 103.0, 104.0])
    monkeypatch.setattr("qvl.engine.start_clock.time.monotonic", lambda: next(now))
    clock = StartClock()
    clock.passed("torch")
    clock.passed("weights")
    assert str(clock) == "3.00 s: torch 2.50, weights 0.50"
    assert clock.seconds == 4.0
