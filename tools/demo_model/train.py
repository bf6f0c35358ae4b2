"""Trains the demo checkpoint: `python -m tools.demo_model.train --out qvl/demo --minutes 22`.

The learning rate follows the clock, so that a run always ends, decayed, at its limit. `--resume FOLDER` continues from
a checkpoint's weights.
"""

import argparse
import json
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import torch

from tools.demo_model import losses as loss_functions
from tools.demo_model import pack
from tools.demo_model.checkpoint import load_checkpoint, save_checkpoint
from tools.demo_model.evaluate import held_out_batches, teacher_forced
from tools.demo_model.feed import Feed, Loader
from tools.demo_model.losses import Heads, step_losses
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.muon import make_optimizers


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fonts", type=Path, default=Path(".fonts"))
    parser.add_argument("--resume", type=Path, help="checkpoint folder to continue from")
    parser.add_argument("--start", type=float, default=0.0, help="curriculum progress (0..1) to begin at")
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--budget", type=int, default=24000, help="vision tokens per batch")
    parser.add_argument("--muon-lr", type=float, default=0.015)
    parser.add_argument("--adam-lr", type=float, default=0.002)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--report", type=int, default=200, help="steps between log lines")
    parser.add_argument("--save-minutes", type=float, default=2.5)
    parser.add_argument("--eval-size", type=int, default=64)
    parser.add_argument("--decay-from", type=float, default=0.4, help="share of the run after which the rate falls")
    return parser.parse_args()


def rate(step: int, done: float, decay_from: float) -> float:
    """Share of the full learning rate: warm-up by steps, then flat, then a straight line to almost zero."""
    falling = 1.0 if done < decay_from else max(0.005, (1 - done) / (1 - decay_from))
    return min(1.0, (step + 1) / 300) * falling


def compile_parts(model: DemoModel) -> None:
    """Blocks and losses alone: equal blocks share their code, shapes stay free."""
    for block in [*model.visual.blocks, *model.model.layers]:
        block.compile(dynamic=True)
    model.visual.merger.compile(dynamic=True)
    for name in ("character_loss", "pointing_loss", "text_loss"):
        setattr(loss_functions, name, torch.compile(getattr(loss_functions, name), dynamic=True))


class Log:
    """Running means of the losses and the speed, printed now and then."""

    def __init__(self, started: float) -> None:
        self.started, self.last = started, time.time()
        self.sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.samples = self.total = 0

    def add(self, found: dict[str, torch.Tensor], samples: int) -> None:
        for name, value in found.items():
            self.sums[name] = self.sums[name] + value.detach()
            self.counts[name] += 1
        self.samples += samples
        self.total += samples

    def line(self, step: int, done: float, extra: str) -> str:
        now = time.time()
        means = " ".join(f"{name} {float(total) / self.counts[name]:.3f}" for name, total in self.sums.items())
        speed = self.samples / (now - self.last)
        text = f"{now - self.started:6.0f}s step {step} done {done:.3f} {means} | {speed:.0f}/s total {self.total / 1e6:.2f}M"
        self.last, self.samples = now, 0
        self.sums.clear()
        self.counts.clear()
        return f"{text} {extra}"


def train(arguments: argparse.Namespace) -> None:
    feed = Feed(arguments.workers, arguments.seed, arguments.fonts, arguments.budget, arguments.start)
    try:
        _train(arguments, feed)
    finally:
        feed.close()


def _train(arguments: argparse.Namespace, feed: Feed) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tests = held_out_batches(arguments.fonts, arguments.eval_size, device)
    model = (load_checkpoint(arguments.resume) if arguments.resume else DemoModel(Shape())).to(device)
    heads = Heads(model.shape.hidden_size).to(device)
    optimizers = make_optimizers(model, heads, arguments.muon_lr, arguments.adam_lr)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if arguments.compile:
        compile_parts(model)
    loader = Loader(feed, device, seed=arguments.seed)
    started, saved, step, done = time.time(), time.time(), 0, 0.0
    log, bad = Log(started), 0
    while done < 1.0:
        done = (time.time() - started) / 60 / arguments.minutes
        progress = arguments.start + (1 - arguments.start) * done
        feed.progress.value = min(1.0, progress)
        share = rate(step, done, arguments.decay_from)
        for optimizer, full in zip(optimizers, rates, strict=True):
            for group, value in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = value * share
        batch = loader.next()
        found = step_losses(model, heads, batch, dtype, min(1.0, 0.1 + progress * 4))
        help_weight = 1.0 if progress < 0.5 else 0.4
        total = found["text"] + sum(weight * help_weight * found[name] for name, weight in
                                    (("characters", 0.5), ("pointing", 0.3), ("place", 1.0)) if name in found)  # fmt: skip
        total.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        log.add(found, batch.recipe.size)
        step += 1
        if step % arguments.report == 0:
            print(log.line(step, done, json.dumps(loader.counts)), flush=True)
            bad += not math.isfinite(float(total.detach()))
        if time.time() - saved > 60 * arguments.save_minutes:
            save_checkpoint(model, arguments.out)
            saved = time.time()
            print(f"  held out: {teacher_forced(model, tests, dtype)}", flush=True)
    save_checkpoint(model, arguments.out)
    print(f"  held out: {teacher_forced(model, tests, dtype)}", flush=True)
    print(f"finished: {step} steps, {log.total / 1e6:.2f}M samples, {pack.level_at(1.0):.0f}", flush=True)


if __name__ == "__main__":
    train(parse())
