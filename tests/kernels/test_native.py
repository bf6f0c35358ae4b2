"""Threads that share the pieces of a call: every piece once, whoever comes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from qvl.kernels.native import NativeUnavailable, load_threads
from tests.kernels.compiled import skip_without_compiler

WORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
PATIENCE = 60.0


@pytest.fixture(scope="module")
def share() -> Any:
    try:
        function = load_threads().qvl_share
    except NativeUnavailable as error:
        skip_without_compiler(error)
    function.argtypes = (ctypes.c_long, ctypes.c_int, WORK, ctypes.c_void_p)
    function.restype = None
    return function


def shared(share: Any, count: int, threads: int, work: Callable[[int], object]) -> None:
    share(count, threads, WORK(lambda _, piece: work(piece) and None), None)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_piece_is_done_once_before_the_call_ends(share: Any, threads: int) -> None:
    for count in (0, 1, 2, 3, 50, *[7] * 300):  # many calls in a row: helpers are late for some
        done: list[int] = []
        shared(share, count, threads, done.append)
        assert sorted(done) == list(range(count))


def test_helpers_come(share: Any) -> None:
    """A piece that waits until another thread has had one ends only if there is another."""
    seen: set[int] = set()

    def work(_: int) -> None:
        seen.add(threading.get_native_id())
        end = time.monotonic() + PATIENCE
        while len(seen) < 2 and time.monotonic() < end:
            time.sleep(0.001)

    shared(share, 2, 2, work)
    assert len(seen) == 2
    time.sleep(0.05)  # by now they sleep
    seen.clear()
    shared(share, 2, 2, work)
    assert len(seen) == 2


def test_no_more_threads_than_wanted(share: Any) -> None:
    shared(share, 50, 5, lambda _: None)  # more helpers exist from here on
    seen: set[int] = set()
    for _ in range(50):
        seen.clear()
        shared(share, 40, 2, lambda _: seen.add(threading.get_native_id()))
        assert len(seen) <= 2


def test_threads_may_call_at_once_and_within_a_call(share: Any) -> None:
    """Whoever finds the helpers taken does its pieces alone."""
    counts: Counter[tuple[int, int]] = Counter()
    lock = threading.Lock()

    def count_one(caller: int, piece: int) -> None:
        with lock:
            counts[caller, piece] += 1

    def call(caller: int) -> None:
        for _ in range(40):
            shared(share, 5, 3, lambda _: shared(share, 4, 3, lambda piece: count_one(caller, piece)))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert counts == {(caller, piece): 200 for caller in range(3) for piece in range(4)}


def test_helpers_take_no_signals(share: Any) -> None:
    """A signal must reach a thread that there was before: Python's own may be waiting for it."""
    seen: list[tuple[bool, set[signal.Signals]]] = []
    own = threading.get_native_id()

    def work(_: int) -> None:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        seen.append((threading.get_native_id() == own, set(blocked)))  # type: ignore[arg-type]
        end = time.monotonic() + PATIENCE
        while len(seen) < 2 and time.monotonic() < end:
            time.sleep(0.001)

    shared(share, 2, 2, work)
    assert {caller: signal.SIGINT in blocked for caller, blocked in seen} == {True: False, False: True}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of Python 3.12 and later, where threads run
def test_a_forked_process_has_its_own(share: Any) -> None:
    shared(share, 50, 3, lambda _: None)
    child = os.fork()
    if child == 0:
        done: list[int] = []
        shared(share, 50, 3, done.append)
        os._exit(0 if sorted(done) == list(range(50)) else 1)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child waits for threads that it does not have")
