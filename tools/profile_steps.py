"""Which kernels a GPU spends a step on: `python tools/profile_steps.py FOLDER [--batch 1] [--picture 1024]`.

Runs decodes (and, with --picture, the first step of a prompt with one picture) under torch's profiler over random
weights of the folder's shape. Prints the kernels by time, and what part of the step none of them covers.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.bench.measure import Prompt
from qvl.bench.ours import QvlSubject
from qvl.engine.config import resolve
from qvl.engine.device import read_facts
from qvl.engine.options import EngineOptions

STEPS = 20


def report(title: str, work: Callable[[], None], steps: int) -> None:
    """Time and kernels of `work`, which does `steps` steps."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / steps * 1000
    kernels = sorted(seen.key_averages(), key=lambda event: -event.device_time_total)
    busy = sum(event.device_time_total for event in kernels) / 1000 / steps
    print(f"\n{title}: {wall:.3f} ms a step (profiled), {busy:.3f} ms in kernels")
    for event in kernels[:25]:
        each = event.device_time_total / 1000 / steps
        print(f"{each:9.4f} ms {each / busy:6.1%} {event.count / steps:7.1f} x  {event.key[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=531)
    parser.add_argument("--picture", type=int, default=0, help="side of a square picture")
    given = parser.parse_args()
    options = EngineOptions(
        model=given.folder, load_format="dummy", max_num_seqs=max(8, given.batch), max_model_len=16384
    )
    subject = QvlSubject(resolve(options, read_facts()))
    engine = subject.engine

    def ask(num_tokens: int) -> None:
        picture = None
        if given.picture:
            picture = np.random.default_rng().integers(0, 256, (given.picture, given.picture, 3), dtype=np.uint8)
        subject._add(Prompt(tuple(random.choices(range(500), k=given.prompt)), picture), num_tokens)

    def finish() -> None:
        while engine.has_work:
            engine.step()

    ask(2)
    finish()  # kernels are built, libraries loaded
    if given.picture:
        ask(1)
        report("a prompt with a picture", finish, 1)
    for _ in range(given.batch):
        ask(STEPS + 400)
    while len(engine.step()) < given.batch:
        pass
    report(f"decodes of {given.batch}", lambda: [engine.step() for _ in range(STEPS)] and None, STEPS)


if __name__ == "__main__":
    main()
