"""Processes beside this one that compile Triton's kernels into its cache on disk, where this one then finds them.

A fifth of such a compilation is Python, which threads can only do one after the other: on a machine's first start that
is seconds. Only then the processes are begun, for they import torch first; a mark in the cache says that there was a
start with these kernels. Nothing depends on them: what they did not do is done here, and whoever does it is the one who
hears what is wrong with a kernel. Knows how to ask them. Does not import torch or Triton.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, TimeoutError
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qvl.kernels.triton_cache import folder_of_cache, settle_cache

COMMAND = (sys.executable, "-m", "qvl.kernels.compiler_process")
FEWEST_CORES = 4  # with less there is nothing to gain beside this process
PATIENCE = 60.0  # seconds until a kernel is rather compiled here
PIPE = 1 << 18  # bytes: all questions of a start, though nobody reads them yet
OTHER_WORDS = (ImportError, AttributeError, KeyError, TypeError, RuntimeError)  # what asking another Triton may raise
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # what has only one can be forked


class Compilers:
    """The processes, as one that is asked and answers in any order. `compile` may be called from many threads."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **dict.fromkeys(ONE_THREAD, "1")},
            pipesize=PIPE,
        )
        self._numbers = itertools.count()
        self._answers: dict[int, Future[None]] = {}
        self._gone = False
        self._lock = threading.Lock()
        self._asked = threading.local()
        threading.Thread(target=self._listen, name="qvl-compilers", daemon=True).start()

    def hear(self, **told: Any) -> None:
        """What Triton tells of a kernel in the thread that is about to hand its compilation to others."""
        self._asked.job = None
        with contextlib.suppress(*OTHER_WORDS):  # the kernel is compiled here
            driver = importlib.import_module("triton.runtime").driver.active
            self._asked.job = {
                "module": told["fn"].module,
                "name": told["fn"].name,
                "hash": told["fn"].jit_function.cache_key,
                "what": told["compile"]["specialization_data"],
                "target": vars(driver.get_current_target()),
            }

    def heard(self) -> dict[str, Any] | None:
        """It, once."""
        job = getattr(self._asked, "job", None)
        self._asked.job = None
        return job

    def compile(self, job: dict[str, Any]) -> None:
        """Wait until it was done, or will not be."""
        answer: Future[None] = Future()
        with self._lock:
            if self._gone:
                return
            number = next(self._numbers)
            self._answers[number] = answer
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(json.dumps({"number": number, **job}).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:  # it has ended
                return
        with contextlib.suppress(TimeoutError):
            answer.result(PATIENCE)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers[int(line)].set_result(None)
        with self._lock:
            self._gone = True
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(None)

    def end(self) -> None:
        """Ask for nothing more. It ends when it has read that; nobody waits for it, but for its number to be free."""
        assert self._process.stdin is not None
        with self._lock, contextlib.suppress(OSError):
            self._gone = True
            self._process.stdin.close()
        threading.Thread(target=self._process.wait, name="qvl-compilers-end", daemon=True).start()


_begun: Compilers | None = None


def begin_compilers(device: str) -> None:
    """Begin them on a machine with a GPU that has not seen these kernels. It helps, or nothing is different."""
    global _begun
    if device == "cpu" or _begun is not None or cores() < FEWEST_CORES or not has_gpu():
        return
    with contextlib.suppress(OSError, PackageNotFoundError):
        settle_cache()
        if not mark().exists():
            _begun = Compilers()


def compilers() -> Compilers | None:
    """Those of this start, which Triton tells of each kernel from now on."""
    if _begun is not None:
        with contextlib.suppress(ImportError, AttributeError):  # a Triton that tells nobody
            importlib.import_module("triton").knobs.runtime.jit_cache_hook = _begun.hear
    return _begun


def end_compilers() -> None:
    """After a start that went well."""
    global _begun
    if _begun is not None:
        with contextlib.suppress(ImportError, AttributeError):
            importlib.import_module("triton").knobs.runtime.jit_cache_hook = None
        _begun.end()
        _begun = None
        with contextlib.suppress(OSError, PackageNotFoundError):
            mark().touch()


def mark() -> Path:
    """A file whose name stands for all that kernels are compiled from, but not for what they are compiled for."""
    sources = sorted(Path(__file__).with_name("on_gpu").glob("[a-z]*.py"))
    known = hashlib.blake2b(f"{version('triton')} {version('torch')}".encode(), digest_size=8)
    for source in sources:
        known.update(source.read_bytes())
    return folder_of_cache() / f"qvl-{known.hexdigest()}"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether there is a driver of NVIDIA's, in Linux or in Windows below it."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))
