"""Trains the demo checkpoint: `python -m tools.demo_model.train --out qvl/demo --minutes 22`.

The learning rate follows the clock, so that a run always ends, decayed, at its limit. `--resume FOLDER` continues from
a checkpoint's weights.
"""

import argparse
import faulthandler
import json
import os
import time
from collections import defaultdict
from pathlib import Path

import torch

from tools.demo_model.checkpoint import load_checkpoint, save_checkpoint
from tools.demo_model.evaluate import held_out_batches, teacher_forced
from tools.demo_model.feed import Feed, Loader
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.step import Stepper, compile_parts


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, default=Path(".fonts"))
    parser.add_argument("--resume", type=Path, help="checkpoint folder to continue from")
    parser.add_argument("--start", type=float, default=0.0, help="curriculum progress (0..1) to begin at")
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--budget", type=int, default=16000, help="vision tokens per batch")
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--report", type=int, default=200, help="steps between log lines")
    parser.add_argument("--save-minutes", type=float, default=1.0)
    parser.add_argument("--eval-minutes", type=float, default=3.0)
    parser.add_argument("--eval-size", type=int, default=64)
    parser.add_argument("--decay-from", type=float, default=0.4, help="progress after which the rate falls")
    return parser.parse_args()


def rate(step: int, progress: float, decay_from: float) -> float:
    """Share of the full learning rate: warm-up by steps, then flat, then a straight line to almost zero."""
    falling = 1.0 if progress < decay_from else max(0.005, (1 - progress) / (1 - decay_from))
    return min(1.0, (step + 1) / 300) * falling


class Log:
    """Running means of the losses and the speed, printed now and then."""

    def __init__(self, started: float) -> None:
        self.started, self.last = started, time.time()
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples = self.total = 0

    def add(self, found: dict[str, torch.Tensor], samples: int) -> None:
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value
            self.counts[name] += 1
        self.samples += samples
        self.total += samples

    def line(self, step: int, progress: float, extra: str) -> str:
        now = time.time()
        means = " ".join(f"{name} {float(total) / self.counts[name]:.3f}" for name, total in self.sums.items())
        speed = self.samples / (now - self.last)
        spent, drawn = now - self.started, self.total / 1e6
        text = f"{spent:6.0f}s step {step} progress {progress:.4f} {means} | {speed:.0f}/s total {drawn:.2f}M"
        self.last, self.samples = now, 0
        self.sums.clear()
        self.counts.clear()
        return f"{text} {extra}"


def _default(choice: bool | None, device: torch.device) -> bool:
    return device.type == "cuda" if choice is None else choice


def train(arguments: argparse.Namespace) -> None:
    feed = Feed(arguments.workers, arguments.seed, arguments.fonts, arguments.budget, arguments.start)
    try:
        _train(arguments, feed)
    finally:
        feed.close()


def _train(arguments: argparse.Namespace, feed: Feed) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    started = saved = judged = time.time()
    faulthandler.enable()
    model = (load_checkpoint(arguments.resume) if arguments.resume else DemoModel(Shape())).to(device)
    stepper = Stepper(model, arguments.muon_lr, arguments.adam_lr, _default(arguments.graphs, device))
    if _default(arguments.compile, device):
        compile_parts()
    loader = Loader(feed, device, seed=arguments.seed)
    tests = held_out_batches(arguments.fonts, arguments.eval_size, device)
    log, step, done = Log(started), 0, 0.0
    while done < 1.0:
        done = (time.time() - started) / 60 / arguments.minutes
        progress = min(1.0, arguments.start + (1 - arguments.start) * done)
        feed.progress.value = progress
        help_weight = 1.0 if progress < 0.5 else 0.5
        stepper.set(rate(step, progress, arguments.decay_from), min(1.0, 0.1 + progress * 5), help_weight)
        batch = loader.next()
        log.add(stepper.run(batch, loader), batch.recipe.size)
        step += 1
        if step % arguments.report == 0:
            print(log.line(step, progress, f"{json.dumps(loader.counts)} graphs {len(stepper.captured)}"), flush=True)
        if time.time() - saved > 60 * arguments.save_minutes:
            save_checkpoint(model, arguments.out)
            saved = time.time()
        if time.time() - judged > 60 * arguments.eval_minutes:
            judged = time.time()
            print(f"  held out: {teacher_forced(model, tests, stepper.dtype)}", flush=True)
    save_checkpoint(model, arguments.out)
    print(f"  held out: {teacher_forced(model, tests, stepper.dtype)}", flush=True)
    print(f"finished: {step} steps, {log.total / 1e6:.2f}M samples", flush=True)


if __name__ == "__main__":
    train(parse())
