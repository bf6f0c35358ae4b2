"""Triton's kernels on a GPU where there is one, else in Triton's interpreter, which has to be chosen before Triton is
imported: in a process of its own.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys

import pytest
import torch

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
here = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="run by test_in_the_interpreter")


def run_in_the_interpreter(file: str) -> None:
    """The tests of a file, all of which have to pass."""
    problem = why_no_interpreter()
    if problem is not None:
        pytest.skip(problem)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def why_no_interpreter() -> str | None:
    try:
        version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed"
    numpy = tuple(int(part) for part in importlib.metadata.version("numpy").split(".")[:2])
    return "the interpreter of this Triton needs numpy < 2.4" if version < (3, 7) and numpy >= (2, 4) else None
