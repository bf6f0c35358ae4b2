"""Trials run beside each other, all of them, whatever becomes of one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qvl.engine import trials
from qvl.engine.config import EngineConfig
from qvl.errors import ConfigError
from tests.engine.harness import make_config

PATIENCE = 60


@pytest.fixture
def config(checkpoint: Path) -> EngineConfig:
    return make_config(checkpoint)


def test_those_for_threads_run_at_the_same_time_and_are_waited_for() -> None:
    meeting = threading.Barrier(3)
    met: list[str] = []

    def meet(name: str) -> Callable[[], object]:
        def run() -> None:
            meeting.wait(PATIENCE)  # breaks, were they run one after the other
            met.append(name)

        return run

    trials.together({name: meet(name) for name in "ab"}, {"main": meet("main")})
    assert sorted(met) == ["a", "b", "main"]


def test_one_that_fails_takes_no_other_along() -> None:
    done: list[str] = []

    def fail() -> None:
        raise ConfigError("that attention cannot run here")

    trials.together(
        {"one": fail, "other": lambda: done.append("thread")}, {"one": fail, "other": lambda: done.append("main")}
    )
    assert sorted(done) == ["main", "thread"]


@pytest.mark.parametrize("in_thread", [True, False])
def test_an_error_that_nobody_expects_is_raised_when_all_are_over(in_thread: bool) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    def work() -> None:
        done.append("done")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        trials.together({"a": fail if in_thread else work, "b": work}, {"c": work if in_thread else fail})
    assert done == ["done", "done"]


def test_without_a_gpu_nothing_is_tried(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "together", lambda *_: pytest.fail("tried out"))
    trials.try_kernels_out(config, torch.device("cpu"))


def test_every_trial_can_be_asked_for_anywhere(config: EngineConfig) -> None:
    """On a CPU each says that there is no such kernel, or which implementation takes its place."""
    for_threads, for_caller = trials.trials(config, torch.device("cpu"))
    found = {name: trial() for name, trial in {**for_threads, **for_caller}.items() if name != "patches"}
    assert found.pop("attention") is not None  # (and patches would be those of whatever GPU there is)
    assert len(found) == 5 and set(found.values()) == {None}
