"""`python -m qvl.kernels.compiler_process`: leaves in Triton's cache what it is asked for, compiled by its children.

A line of JSON in: the number of the question, the module, the name and the hash of a kernel, what Triton says it is
compiled for, and the GPU. A line out, in any order: the number, when it is done, well or not. It ends with its input.
Never touches a GPU. Knows nothing of kernels but where they are.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from qvl.kernels.compilers import OTHER_WORDS, cores

MOST = 16  # processes; each takes some 200 MB while it compiles


class Target:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, target: dict[str, Any]) -> None:
        self._target = importlib.import_module("triton.backends.compiler").GPUTarget(**target)

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def compile_one(question: dict[str, Any]) -> None:
    """Leave the kernel in the cache on disk."""
    importlib.import_module("triton.runtime").driver.set_active(Target(question["target"]))
    kernel = getattr(importlib.import_module(question["module"]), question["name"])
    # Triton's hash of a function depends on which of those that it calls were hashed before: with another one, what is
    # compiled here would not be found.
    kernel.hash = question["hash"]
    kernel.preload(question["what"])


def make_ready() -> None:
    """Import what children need before there are any: they come with it."""
    for source in sorted(Path(__file__).with_name("on_gpu").glob("[a-z]*.py")):
        with suppress(*OTHER_WORDS):  # it is for another Triton; whoever wants it hears why
            importlib.import_module(f"qvl.kernels.on_gpu.{source.stem}")
    importlib.import_module("triton.runtime.cache").triton_key()


def answer(questions: Iterable[bytes], answers: BinaryIO) -> None:
    """Until there are no more."""

    def tell(number: int) -> None:
        with suppress(OSError):  # nobody is there any more
            answers.write(b"%d\n" % number)
            answers.flush()

    with ProcessPoolExecutor(min(cores(), MOST), multiprocessing.get_context("fork")) as children:
        for line in questions:
            question = json.loads(line)
            number = question.pop("number")

            def done(_: Future[None], number: int = number) -> None:
                tell(number)

            children.submit(compile_one, question).add_done_callback(done)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent, at whose end this one ends
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a compiler prints is no answer
    make_ready()
    answer(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
