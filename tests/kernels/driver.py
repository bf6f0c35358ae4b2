"""A GPU's driver for Triton where there is no GPU: kernels are compiled, and launches are written down."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qvl.kernels import gpu


class Driver:
    """What Triton asks of a GPU's driver before it launches; `loaded` are names of kernels, `seen` is what
    launchers were called with.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.loaded: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
            load_binary=self.load_binary,
        )

    def load_binary(self, name: str, *_: object) -> tuple[Any, ...]:
        self.loaded.append(name)
        return ("module", 7, 9, 0, 1024)

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *arguments: self.seen.append(arguments)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 77


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Driver:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter launches nothing")
    triton: Any = pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    fake = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", fake)
    monkeypatch.setattr(gpu, "_launches", {})
    return fake


def fresh(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> Any:
    """The kernel as if it had never been compiled."""
    monkeypatch.setattr(kernel, "device_caches", collections.defaultdict(kernel.create_binder))
    return kernel
