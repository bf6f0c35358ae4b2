"""The measurements of GPU kernels: what they count, what they refuse, and on a GPU that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qvl.bench.gpu_timing import Ceilings, Row
from qvl.bench.shape import SHAPES, write_shape
from qvl.specs import load_spec


def qvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qvl", "bench", "kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.parametrize("name", SHAPES)
def test_the_matrices_of_a_token_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")

    from qvl.bench.kernels import matrices

    text = load_spec(write_shape(name, tmp_path / name)).text
    counted = sum(rows * width * count for _, rows, width, count, *_ in matrices(SHAPES[name]))
    assert counted == text.num_layers * text.layer_matrix_parameters + text.vocab_size * text.hidden_size


def test_a_row_is_held_against_what_bounds_it() -> None:
    ceilings = Ceilings(bandwidth=4e12, operations=8e14)
    memory = Row("products", "one row", seconds=2e-5, num_bytes=4e7, operations=1e9)
    assert memory.floor(ceilings) == pytest.approx(1e-5)
    assert "2.00 TB/s" in memory.line(ceilings)
    assert "2.00 x floor" in memory.line(ceilings)
    work = Row("fp8", "many rows", seconds=1e-3, num_bytes=4e7, operations=4e11)
    assert "400 TFLOP/s" in work.line(ceilings)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--only", "speed"], "--only knows products"), (["--shape", "3b"], "--shape knows 2b, 7b, 72b, not '3b'")],
)
def test_what_it_does_not_know_it_refuses(arguments: list[str], says: str) -> None:
    done = qvl(*arguments)
    assert done.returncode == 2
    assert says in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_last_line_is_one_object() -> None:
    done = qvl("--shape", "2b", "--only", "between")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"]
