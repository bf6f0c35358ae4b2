"""Threads wait asleep in the engine process, unless somebody chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from qvl.engine.openmp import CHOICES, wait_asleep

ASKS_THE_RUNTIME = """
import os
from qvl.engine.openmp import wait_asleep
wait_asleep(os.environ)
import torch
"""


def test_threads_wait_asleep() -> None:
    environment = {"PATH": "/bin"}
    wait_asleep(environment)
    assert environment == {"PATH": "/bin", "OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_of_the_user_stays(name: str) -> None:
    environment = {name: "7"}
    wait_asleep(environment)
    assert environment == {name: "7"}


def test_the_runtime_hears_of_it() -> None:
    """What torch's own OpenMP runtime prints of its settings; it read them when torch was imported, afterwards."""
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    environment["OMP_DISPLAY_ENV"] = "TRUE"
    done = subprocess.run(
        [sys.executable, "-c", ASKS_THE_RUNTIME], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    if "OMP_WAIT_POLICY" not in done.stderr:
        pytest.skip("this OpenMP runtime does not tell")
    assert "PASSIVE" in next(line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line)
