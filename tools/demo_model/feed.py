"""Processes that draw batches into shared memory, and the thread that carries them to the device.

Knows buffers and queues. Batches that arrive more slowly than training asks are used again (with fresh noise).
"""

import contextlib
import multiprocessing as mp
import multiprocessing.sharedctypes
import os
import queue
import random
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.demo_model import pack
from tools.demo_model.fonts import FontBook
from tools.demo_model.tasks import Grid

BUFFER = 64 * 2**20
ARRAYS = ("ids", "positions", "refs", "vision", "points", "steady", "rows", "row_labels")


@dataclass
class Batch:
    """One batch on the device."""

    recipe: pack.Recipe
    pixels: list[Tensor]  # per group of consecutive equal grids: uint8 [b, slots, frames, h, w, 3]
    arrays: dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        return [*self.pixels, *(self.arrays[name] for name in ARRAYS)]


def _draw_forever(
    worker: int,
    workers: int,
    seed: int,
    fonts: Path,
    budget: int,
    free: Any,
    ready: Any,
    progress: Any,
    memory: list[Any],
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    book, index, parent = FontBook(fonts, "train"), worker, os.getppid()
    while True:
        arrays, samples = pack.make_batch(seed, index, book, progress.value, budget)
        size = pack.pixel_bytes(arrays["recipe"])
        slot = None
        while slot is None:
            with contextlib.suppress(queue.Empty):
                slot = free.get(timeout=2)
            if os.getppid() != parent:
                return
        pack.fill_pixels(samples, arrays["recipe"], np.frombuffer(memory[slot], np.uint8)[:size])
        ready.put((slot, arrays))
        index += workers


class Feed:
    """Draws in `workers` processes. Start it before the first use of the GPU: it forks."""

    def __init__(self, workers: int, seed: int, fonts: Path, budget: int, start: float = 0.0, buffers: int = 0) -> None:
        context = mp.get_context("fork")
        buffers = buffers or 2 * workers + 4
        self.memory = [multiprocessing.sharedctypes.RawArray("B", BUFFER) for _ in range(buffers)]
        self.free, self.ready = context.Queue(), context.Queue()
        self.progress = context.Value("d", start, lock=False)
        for slot in range(buffers):
            self.free.put(slot)
        arguments = (workers, seed, fonts, budget, self.free, self.ready, self.progress, self.memory)
        self.processes = [
            context.Process(target=_draw_forever, args=(worker, *arguments), daemon=True) for worker in range(workers)
        ]
        for process in self.processes:
            process.start()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()

    def next_host(self) -> tuple[int, dict[str, Any]]:
        return self.ready.get()


def groups(grids: tuple[Grid, ...]) -> list[tuple[Grid, int]]:
    """Runs of equal grids: (grid, slots)."""
    runs: list[tuple[Grid, int]] = []
    for grid in grids:
        if runs and runs[-1][0] == grid:
            runs[-1] = (grid, runs[-1][1] + 1)
        else:
            runs.append((grid, 1))
    return runs


def to_device(arrays: dict[str, Any], pixels: np.ndarray, device: torch.device) -> Batch:
    """Copies one packed batch; the pixel buffer may be reused when the device has caught up."""
    recipe: pack.Recipe = arrays["recipe"]
    frames, start, parts = 2 if recipe.sort == "video" else 1, 0, []
    flat = torch.from_numpy(pixels).to(device, non_blocking=True)
    for (rows, columns), slots in groups(recipe.grids):
        shape = (slots, recipe.size, frames, rows * 28, columns * 28, 3)
        count = int(np.prod(shape))
        parts.append(flat[start : start + count].view(shape).transpose(0, 1))
        start += count
    moved = {name: torch.from_numpy(arrays[name]).to(device, non_blocking=True) for name in ARRAYS}
    for name in ("ids", "refs", "vision"):
        moved[name] = moved[name].long()
    return Batch(recipe, parts, moved)


class Loader:
    """Fresh batches when there are any, else one of the latest again."""

    def __init__(self, feed: Feed, device: torch.device, keep: int = 200, seed: int = 0) -> None:
        self.feed, self.device, self.rng = feed, device, random.Random(seed)
        self.fresh: queue.Queue[Batch] = queue.Queue(maxsize=6)
        self.recent: deque[Batch] = deque(maxlen=keep)
        self.counts = {"fresh": 0, "again": 0}
        self.lock = threading.Lock()  # held by whoever must be alone with the device
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream() if cuda else None
        if cuda:
            for memory in self.feed.memory:
                address = np.frombuffer(memory, np.uint8).ctypes.data
                torch.cuda.cudart().cudaHostRegister(address, BUFFER, 0)
        while True:
            slot, arrays = self.feed.next_host()
            view = np.frombuffer(self.feed.memory[slot], np.uint8)[: pack.pixel_bytes(arrays["recipe"])]
            if stream is not None:
                with self.lock, torch.cuda.stream(stream):
                    batch = to_device(arrays, view, self.device)
                    stream.synchronize()
            else:
                batch = to_device(arrays, view.copy(), self.device)
            self.feed.free.put(slot)
            self.fresh.put(batch)

    def next(self, floor: int = 4) -> Batch:
        """`floor`: how many batches must be at hand before any is used again."""
        if self.fresh.empty() and len(self.recent) >= floor:
            self.counts["again"] += 1
            return self.rng.choice(self.recent)
        batch = self.fresh.get()
        self.counts["fresh"] += 1
        self.recent.append(batch)
        return batch
