"""Runs training steps: eagerly, or as one captured CUDA graph per recipe, so that the host costs nothing.

Knows how a step is executed; what it computes is in losses.py.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tools.demo_model import losses as loss_functions
from tools.demo_model.feed import Batch, Loader
from tools.demo_model.losses import Heads, step_losses
from tools.demo_model.model import DemoModel, Layer, Merger, VisionBlock
from tools.demo_model.muon import make_optimizers
from tools.demo_model.pack import Recipe

WEIGHTS = {"text": 1.0, "characters": 0.5, "pointing": 0.3, "place": 1.0}


def compile_parts() -> None:
    """Blocks and losses alone, with free shapes; the many equal blocks share the compiled code."""
    for part in (VisionBlock, Layer, Merger):
        part.forward = torch.compile(part.forward, dynamic=True)  # type: ignore[method-assign]
    for name in ("character_loss", "pointing_loss", "text_loss"):
        setattr(loss_functions, name, torch.compile(getattr(loss_functions, name), dynamic=True))


@dataclass
class Captured:
    batch: Batch
    graph: torch.cuda.CUDAGraph
    found: dict[str, Tensor]


class Stepper:
    """`controls`: numbers that change during the run and live on the device."""

    def __init__(self, model: DemoModel, muon_lr: float, adam_lr: float, graphs: bool) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.heads = Heads(model.shape.hidden_size).to(self.device)
        self.full = (muon_lr, adam_lr)
        self.controls = {name: torch.tensor(0.0, device=self.device) for name in ("strength", "help")}
        rates = [torch.tensor(value, device=self.device) for value in self.full]
        self.optimizers = make_optimizers(model, self.heads, *rates)
        self.graphs = graphs
        self.pool: Any = None
        self.stream = torch.cuda.Stream() if graphs else None  # one stream: graphs then share their memory
        self.captured: dict[Recipe, Captured] = {}
        self.running: deque[tuple[torch.cuda.Event, Batch]] = deque()

    def set(self, rate: float, strength: float, help_weight: float) -> None:
        self.controls["strength"].fill_(strength)
        self.controls["help"].fill_(help_weight)
        for optimizer, full in zip(self.optimizers, self.full, strict=True):
            for group in optimizer.param_groups:
                group["lr"].fill_(full * rate)

    def eager(self, batch: Batch) -> dict[str, Tensor]:
        found = step_losses(self.model, self.heads, batch, self.dtype, self.controls["strength"])
        helpers = [WEIGHTS[name] * value for name, value in found.items() if name != "text"]
        total = found["text"] + (self.controls["help"] * sum(helpers) if helpers else 0.0)
        total.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: value.detach() for name, value in found.items()}

    def run(self, batch: Batch, loader: Loader) -> dict[str, Tensor]:
        if not self.graphs:
            return self.eager(batch)
        held = self.captured.get(batch.recipe)
        if held is None:
            return self._capture(batch, loader)
        for mine, theirs in zip(held.batch.tensors(), batch.tensors(), strict=True):
            mine.copy_(theirs)
        held.graph.replay()
        self._pace(batch)
        return held.found

    def _pace(self, batch: Batch) -> None:
        """Let the host run at most three steps ahead, and keep the batches of those steps alive."""
        event = torch.cuda.Event()
        event.record()
        self.running.append((event, batch))
        if len(self.running) > 3:
            self.running.popleft()[0].synchronize()

    def _capture(self, batch: Batch, loader: Loader) -> dict[str, Tensor]:
        """One eager step to warm up (it trains like any other), then record the next."""
        pixels = [part.clone(memory_format=torch.contiguous_format) for part in batch.pixels]
        own = Batch(batch.recipe, pixels, {name: value.clone() for name, value in batch.arrays.items()})
        stream = self.stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            first = self.eager(own)
        torch.cuda.current_stream().wait_stream(stream)
        with loader.lock:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=stream, capture_error_mode="thread_local"):
                found = self.eager(own)
        self.pool = self.pool or graph.pool()
        self.captured[batch.recipe] = Captured(own, graph, found)
        return first
