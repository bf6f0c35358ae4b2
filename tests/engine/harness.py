"""Engines over tiny checkpoints, and prompts of token ids and pictures made without tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from qvl.engine.block_manager import BlockManager
from qvl.engine.config import EngineConfig, EngineOptions, resolve
from qvl.engine.device import read_facts
from qvl.engine.engine import Engine
from qvl.engine.protocol import AddRequest, MediaInput, TokenOutput
from qvl.layers.norm import LayerNorm, RMSNorm
from qvl.models.weights import DUMMY_BLOCK, fill_repeated
from qvl.prompt import TextRun, Vision, build
from qvl.specs import load_spec
from qvl.types import Grid, SamplingParams, TokenLogprob

Pixels = npt.NDArray[np.uint8]
PATCH, FACTOR = 14, 28
USUAL: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1, "num_blocks": 256}
read_spec = cache(load_spec)


def make_config(folder: Path, **options: Any) -> EngineConfig:
    """fp32 on one thread, with a cache of 256 blocks unless `options` say otherwise."""
    chosen = EngineOptions(model=str(folder), **{**USUAL, **options})
    return resolve(chosen, read_facts(chosen.device))


def make_engine(folder: Path, **options: Any) -> Engine:
    return Engine(make_config(folder, **options))


def fill_normally(model: torch.nn.Module) -> None:
    """Weights with which an answer depends on all that was read. A test that compares answers of dummy weights puts
    this in the place of `qvl.models.weights.fill_randomly`, whose numbers are so small that the last token alone
    decides about the next.
    """
    block = torch.randn(DUMMY_BLOCK, generator=torch.Generator().manual_seed(0)) * 0.02
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if isinstance(module, RMSNorm | LayerNorm):
                parameter.data.fill_(1.0 if leaf == "weight" else 0.0)
            else:
                fill_repeated(parameter.data.view(-1), block.to(parameter.device, parameter.dtype))


def greedy(max_tokens: int = 16, **changes: Any) -> SamplingParams:
    """Resolved parameters without end tokens."""
    neutral: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    return SamplingParams(**{**neutral, "max_tokens": max_tokens, "ignore_eos": True, **changes})


def pixels(seed: int, rows: int, columns: int, frames: int = 1) -> Pixels:
    """A random picture of `rows` x `columns` tokens, or a video of them."""
    size = (frames, rows * FACTOR, columns * FACTOR, 3)
    return np.random.default_rng([seed, *size]).integers(0, 256, size, dtype=np.uint8)


def words(seed: int, count: int) -> list[int]:
    """Random ordinary token ids."""
    return [int(word) for word in np.random.default_rng(seed).integers(0, 500, count)]


@dataclass
class Ask:
    """A request and its pictures, before it has an id."""

    pieces: Sequence[list[int] | Pixels]
    sampling: SamplingParams = field(default_factory=greedy)
    salt: bytes = b""

    def submit(self, engine: Engine, request_id: str) -> None:
        spec = engine.config.spec
        arrays = [piece for piece in self.pieces if isinstance(piece, np.ndarray)]
        segments = [self._segment(piece) for piece in self.pieces]
        prompt = build(
            segments,
            lambda text: [int(word) for word in text.split()],
            image_pad=spec.ids.image_pad,
            video_pad=spec.ids.video_pad,
            merge_size=2,
        )
        media = [
            MediaInput(
                kind=span.kind, offset=span.offset, length=span.length, t=span.grid.t, h=span.grid.h, w=span.grid.w,
                digest=span.digest, height=array.shape[1], width=array.shape[2],
            )
            for span, array in zip(prompt.spans, arrays, strict=True)
        ]  # fmt: skip
        engine.add(AddRequest(request_id, prompt.token_ids, media, self.sampling, self.salt), arrays)

    def _segment(self, piece: list[int] | Pixels) -> TextRun | Vision:
        if isinstance(piece, list):
            return TextRun(" ".join(map(str, piece)))
        frames, height, width, _ = piece.shape
        digest = (hash(piece.tobytes()) % 2**128).to_bytes(16, "little")
        grid = Grid(-(-frames // 2), height // PATCH, width // PATCH)
        return Vision("image" if frames == 1 else "video", grid, digest)


@dataclass
class Outcome:
    """Everything an engine said about one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None

    def take(self, output: TokenOutput) -> None:
        assert self.finish_reason is None, "something was said after the end"
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason
        self.num_cached_tokens, self.error = output.num_cached_tokens, output.error


def run(engine: Engine, asks: Sequence[Ask], stagger: int = 0) -> list[Outcome]:
    """Serve `asks` together (every `stagger` steps one more joins); the engine must be idle and whole afterwards."""
    outcomes = [Outcome() for _ in asks]
    names = {f"request-{i}": outcome for i, outcome in enumerate(outcomes)}
    waiting = list(zip(names, asks, strict=True))
    steps = 0
    while waiting or engine.has_work:
        while waiting and (not stagger or steps % stagger == 0 or not engine.has_work):
            name, ask = waiting.pop(0)
            ask.submit(engine, name)
            if stagger:
                break
        for output in engine.step():
            names[output.request_id].take(output)
        engine.check_integrity()
        steps += 1
        assert steps < 5000, "no end in sight"
    assert all(outcome.finish_reason is not None for outcome in outcomes)
    return outcomes


def forget_blocks(engine: Engine) -> None:
    """Nothing that an idle engine has computed is found again."""
    blocks = engine.scheduler.blocks
    assert blocks.num_used == 0
    engine.scheduler.blocks = BlockManager(blocks.num_blocks, blocks.block_size, blocks.enable_prefix_caching)


def run_alone(folder: Path, ask: Ask, **options: Any) -> list[int]:
    """The answer's tokens from an engine of its own."""
    return run(make_engine(folder, **options), [ask])[0].token_ids
