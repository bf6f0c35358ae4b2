"""Compiling in other processes: what they did is found, what they did not do is done here, and nobody waits in vain."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl.kernels import compilers, gpu
from qvl.kernels.compilers import Compilers, begin_compilers, end_compilers, mark
from tests.kernels.driver import Driver, driver, fresh

__all__ = ["driver"]

JOB: dict[str, Any] = {"module": "somewhere", "name": "kernel", "hash": "", "what": "{}", "target": {}}


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    yield
    if (left := compilers._begun) is not None:
        compilers._begun = None
        left.end()


@pytest.fixture
def first_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A machine with a GPU and cores that never compiled these kernels; the list says what became of processes."""
    begun: list[str] = []

    class Begun:
        def __init__(self) -> None:
            begun.append("begun")

        def end(self) -> None:
            begun.append("ended")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilers, "Compilers", Begun)
    monkeypatch.setattr(compilers, "version", lambda _: "1.0")
    monkeypatch.setattr(compilers, "has_gpu", lambda: True)
    monkeypatch.setattr(compilers, "cores", lambda: 16)
    return begun


def test_they_help_the_first_start_alone(first_start: list[str]) -> None:
    begin_compilers("auto")
    begin_compilers("auto")
    assert first_start == ["begun"]
    end_compilers()
    assert first_start == ["begun", "ended"] and mark().exists()
    begin_compilers("auto")
    end_compilers()
    assert first_start == ["begun", "ended"]


def test_a_start_that_failed_was_none(first_start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    begin_compilers("cuda")
    monkeypatch.setattr(compilers, "_begun", None)  # as in the next process
    begin_compilers("cuda")
    assert first_start == ["begun", "begun"]


@pytest.mark.parametrize(
    ("what", "value"), [("has_gpu", lambda: False), ("cores", lambda: compilers.FEWEST_CORES - 1)], ids=["gpu", "cores"]
)
def test_there_are_machines_that_they_do_not_help(
    first_start: list[str], monkeypatch: pytest.MonkeyPatch, what: str, value: object
) -> None:
    begin_compilers("cpu")
    monkeypatch.setattr(compilers, what, value)
    begin_compilers("auto")
    end_compilers()
    assert first_start == [] and not mark().exists()


def test_other_kernels_have_another_mark(first_start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = mark()
    monkeypatch.setattr(compilers, "version", lambda name: "2.0" if name == "triton" else "1.0")
    assert mark() != before


def test_without_triton_there_is_nothing_to_compile(first_start: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compilers, "version", missing)
    begin_compilers("auto")
    assert first_start == []


def speaking(monkeypatch: pytest.MonkeyPatch, program: str) -> Compilers:
    monkeypatch.setattr(compilers, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(compilers, "PATIENCE", 600.0)
    return Compilers()


def ask(asked: Compilers, count: int) -> list[threading.Thread]:
    threads = [threading.Thread(target=asked.compile, args=(JOB,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_answers_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import json, sys
numbers = [json.loads(sys.stdin.readline())["number"] for _ in range(3)]
for number in reversed(numbers):
    print(number, flush=True)
sys.stdin.read()
"""
    asked = speaking(monkeypatch, program)
    for thread in ask(asked, 3):
        thread.join()  # returns: each has heard its own
    asked.end()


@pytest.mark.parametrize("reads", ["", "sys.stdin.readline()"])
def test_nobody_waits_for_one_that_is_gone(monkeypatch: pytest.MonkeyPatch, reads: str) -> None:
    asked = speaking(monkeypatch, f"import sys\n{reads}")
    for thread in ask(asked, 3):
        thread.join()
    asked.compile(JOB)
    asked.end()


def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = speaking(monkeypatch, "import sys\nsys.stdin.read()")
    monkeypatch.setattr(compilers, "PATIENCE", 0.0)
    asked.compile(JOB)
    asked.end()


def test_a_triton_that_speaks_in_other_words_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = speaking(monkeypatch, "")
    asked.hear(function="kernel", target="sm_90")
    assert asked.heard() is None
    asked.end()


def test_what_they_compiled_is_found(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    """And a kernel that they cannot compile is answered too, which leaves it to whoever asked."""
    from triton import knobs

    from qvl.kernels.on_gpu import ops_tower

    found: list[bool] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda cache_hit, **_: found.append(cache_hit))
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    monkeypatch.setattr(compilers, "PATIENCE", 600.0)
    begun = Compilers()
    monkeypatch.setattr(compilers, "_begun", begun)
    kernel = fresh(monkeypatch, ops_tower._quick_gelu)
    monkeypatch.setattr(kernel, "hash", "depends on what was hashed before")
    with gpu.compiling_together():
        ops_tower.quick_gelu(torch.zeros(5, 8))
        ops_tower.quick_gelu(torch.zeros(5, 8, dtype=torch.bfloat16))
    assert found == [True, True] and driver.loaded == [kernel.__name__] * 2
    target = vars(driver.get_current_target())
    begun.compile({"module": ops_tower.__name__, "name": "_unknown", "hash": "", "what": "{}", "target": target})
    end_compilers()
    assert knobs.runtime.jit_cache_hook is None and compilers._begun is None
    assert begun._process.wait(600) == 0  # its input has ended
