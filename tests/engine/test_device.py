"""What is read about the machine before loading."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
