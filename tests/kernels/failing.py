"""A kernel's trial that does not go well, for tests of what is then used instead."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from qvl.kernels import gpu

PROBLEMS = ["wrong numbers", "raises"]


def warning_of(
    problem: str,
    kernels: str,
    chooser: ModuleType,
    choose: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> str:
    """What is said, once, when `choose` of `chooser` tries out a kernel of module `kernels` and it has this problem,
    or for "raises" an error as from a compiler. Nothing is chosen then.
    """

    def fails(*_: object) -> str:
        if problem == "raises":
            raise OSError("no compiler")
        return problem

    tried = pytest.importorskip(kernels, reason="Triton is not installed")
    monkeypatch.setattr(chooser, "gpu_problem", lambda: None)
    monkeypatch.setattr(chooser, "capability_of", lambda _: gpu.HOPPER)
    monkeypatch.setattr(tried, "problem_of", fails)
    gpu.warn_of.cache_clear()
    choose.cache_clear()
    try:
        for _ in range(2):
            assert choose(torch.device("cuda"), torch.bfloat16) is None
    finally:
        choose.cache_clear()
        gpu.warn_of.cache_clear()
    (warning,) = caplog.records
    said = warning.getMessage()
    assert ("OSError: no compiler" if problem == "raises" else problem) in said
    return said
