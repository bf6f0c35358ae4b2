"""What parts of the network cost a GPU that is hot: `python tools/measure_energy.py FOLDER`.

A GPU at its power cap lowers its clock, so over seconds a part takes as long as its joules allow. Each part runs alone
over random weights of the folder's shape: ms behind a pause, then ms, joules, watts and clock of a steady second.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.bench.measure import Prompt
from qvl.bench.ours import QvlSubject
from qvl.engine.config import resolve
from qvl.engine.device import read_facts
from qvl.engine.options import EngineOptions
from qvl.types import Grid

SM_CLOCK = 1  # NVML's number for it
WARM_SECONDS, STEADY_SECONDS = 0.5, 1.0
WORDS = 32_000  # random token ids lie below


class Meter:
    """Joules and clock of the first visible GPU, by the driver's own library."""

    def __init__(self) -> None:
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._gpu = ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        index = ctypes.c_uint(int(first) if first.isdigit() else 0)
        self._ask("nvmlDeviceGetHandleByIndex_v2", index, ctypes.byref(self._gpu))

    def _ask(self, function: str, *arguments: object) -> None:
        error = getattr(self._nvml, function)(*arguments)
        if error:
            raise SystemExit(f"{function} failed with NVML error {error}")

    def joules(self) -> float:
        """Since the driver was loaded."""
        found = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._gpu, ctypes.byref(found))
        return found.value / 1000

    def clock(self) -> int:
        found = ctypes.c_uint()
        self._ask("nvmlDeviceGetClockInfo", self._gpu, SM_CLOCK, ctypes.byref(found))
        return found.value


def seconds_of(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def report(meter: Meter, title: str, work: Callable[[], object]) -> None:
    work()
    time.sleep(0.3)
    cold = statistics.median(seconds_of(work) for _ in range(5))
    runs = max(1, round(0.05 / cold))
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        seconds_of(lambda: [work() for _ in range(runs)])
    joules, start, done, clocks = meter.joules(), time.perf_counter(), 0, []
    while time.perf_counter() < start + STEADY_SECONDS:
        for _ in range(runs):
            work()
        clocks.append(meter.clock())
        torch.cuda.synchronize()
        done += runs
    seconds, joules = time.perf_counter() - start, meter.joules() - joules
    print(
        f"{title:28s} {cold * 1000:8.3f} ms at first, {seconds / done * 1000:8.3f} ms in the long run,"
        f" {joules / done:7.3f} J, {joules / seconds:4.0f} W, {statistics.median(clocks):5.0f} MHz",
        flush=True,
    )


def recorded(work: Callable[[int], object], count: int) -> Callable[[], object]:
    """`work` of 0 to count - 1 as one CUDA graph."""
    work(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            work(i)
    return graph.replay


def parts(subject: QvlSubject) -> Iterator[tuple[str, Callable[[], object]]]:
    model = subject.engine.runner.model
    text, vision = subject.engine.config.spec.text, subject.engine.config.spec.vision
    like = {"device": model.device, "dtype": model.compute_dtype}
    for count, side in ((1, 74), (4, 32)):
        patches = [torch.randn(side * side, vision.patch_dim, **like) for _ in range(count)]
        grids = [Grid(1, side, side)] * count
        yield (
            f"tower of {count} x {side * side} patches",
            lambda patches=patches, grids=grids: model.encode_media(list(patches), grids),
        )
    hidden, inner = text.hidden_size, text.intermediate_size
    heads = (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    shapes = [(heads, hidden), (hidden, text.num_heads * text.head_dim), (2 * inner, hidden), (hidden, inner)]
    weights = [[torch.randn(*shape, **like) * 0.02 for _ in range(4)] for shape in shapes]
    for rows in (256, 768, 1024, 1454, 2304):
        inputs = {shape[1]: torch.randn(rows, shape[1], **like) for shape in shapes}

        def layer(i: int, inputs: dict[int, torch.Tensor] = inputs) -> None:
            for copies in weights:
                F.linear(inputs[copies[0].shape[1]], copies[i % 4])

        yield f"products of {rows} rows", recorded(layer, text.num_layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    options = EngineOptions(model=parser.parse_args().folder, load_format="dummy", max_model_len=16384)
    subject = QvlSubject(resolve(options, read_facts()))
    engine, meter = subject.engine, Meter()
    with torch.inference_mode():
        for title, work in parts(subject):
            report(meter, title, work)
    for batch, context in ((32, 1450), (64, 1450), (256, 600)):
        for _ in range(batch):
            words = np.random.default_rng().integers(0, WORDS, context)
            subject._add(Prompt(tuple(int(word) for word in words)), 4000)
        while len(engine.step()) < batch:
            pass
        report(meter, f"step of {batch} x {context} tokens", engine.step)
        for seq in list(engine.scheduler.running):
            engine.abort(seq.request_id)
        engine.step()


if __name__ == "__main__":
    main()
