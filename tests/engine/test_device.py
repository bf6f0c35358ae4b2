"""What is read about the machine before loading."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qvl.engine import device


@pytest.mark.parametrize(
    ("quota", "asked", "cores"),
    [
        ("max 100000\n", "", 8),
        ("250000 100000\n", "", 2),
        ("20000 100000\n", "", 1),
        ("nonsense", "", 8),
        ("max 100000\n", "3", 3),
        ("max 100000\n", "64", 8),
        ("max 100000\n", "4,2", 4),
        ("max 100000\n", "many", 8),
        ("250000 100000\n", "5", 2),
    ],
)
def test_cores_that_may_be_kept_busy(
    quota: str, asked: str, cores: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(device, "CGROUP_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert device.usable_cores() == cores
    assert device.read_facts("cpu").num_cores == cores
    monkeypatch.setattr(device, "CGROUP_QUOTA", tmp_path / "none")
    assert device.usable_cores() >= cores


@pytest.mark.parametrize("driver", ["there", "refuses", "missing"])
def test_an_engine_has_one_stream_for_each_gpu(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's, or torch's where the driver has none to give."""

    def create(handle: Any, flags: int) -> int:
        handle._obj.value = 4096
        return 0 if driver == "there" else 1

    def load(name: str) -> object:
        if driver == "missing":
            raise OSError(name)
        return SimpleNamespace(cuStreamCreate=create)

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda where: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda where: ("torch's", where))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))
    device.own_stream.cache_clear()
    gpu = torch.device("cuda", 0)
    found: Any = device.own_stream(gpu)
    assert found == ((4096, gpu) if driver == "there" else ("torch's", gpu))
    assert device.own_stream(gpu) is found
    device.own_stream.cache_clear()
