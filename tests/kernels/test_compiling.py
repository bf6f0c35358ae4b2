"""Compiling together: nothing runs meanwhile, all is ready afterwards, and what cannot be says so when launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qvl.kernels import compiling, gpu
from tests.kernels.driver import Driver, driver, fresh
from tests.kernels.test_gpu import Kernel

__all__ = ["driver"]


def test_kernels_are_compiled_together_and_run_afterwards() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    kernel = Kernel()
    with gpu.compiling_together():
        gpu.launch(kernel, (1,), 5, EARLY=True)
    gpu.launch(kernel, (1,), 5, EARLY=False)
    assert kernel.seen == [("compiled", {"EARLY": True, "launch_pdl": True}), ("ran", {"EARLY": False})]


def test_without_a_mode_for_it_kernels_just_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "triton_module", lambda: None)
    kernel = Kernel()
    with gpu.compiling_together():
        gpu.launch(kernel, (1,))
    assert kernel.seen == [("ran", {})]


def test_what_was_compiled_is_loaded_before_it_is_launched(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    from qvl.kernels.on_gpu import ops_tower

    fresh(monkeypatch, ops_tower._quick_gelu)
    with gpu.compiling_together():
        for dtype in (torch.bfloat16, torch.float16):
            ops_tower.quick_gelu(torch.zeros(5, 8, dtype=dtype))
    assert driver.loaded == ["_quick_gelu", "_quick_gelu"] and driver.seen == []
    ops_tower.quick_gelu(torch.zeros(5, 8, dtype=torch.float16))
    assert len(driver.loaded) == 2 and len(driver.seen) == 1


def test_what_cannot_be_loaded_says_so_when_it_is_launched(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    from qvl.kernels.on_gpu import ops_tower

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(driver.utils, "load_binary", refuse)
    fresh(monkeypatch, ops_tower._quick_gelu)
    with gpu.compiling_together():
        ops_tower.quick_gelu(torch.zeros(5, 8))
    with pytest.raises(RuntimeError, match="no such instruction"):
        ops_tower.quick_gelu(torch.zeros(5, 8))
    assert driver.seen == []
