"""What 8 and 4 bits save on this CPU: `python tools/measure_precision.py [--seconds 120]`.

The 2B shape with 6 of its 28 decoder layers and 2 of its 32 vision blocks and random weights, in bf16, int8 and int4 in
one process, taking turns. One thread; CPU time of that thread, so that a busy machine disturbs little; the least of all
turns; layers scaled up to the whole model. Knows nothing of scheduling and sampling: `qvl bench engine` measures those.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.bench.machine import describe
from qvl.bench.shape import write_shape
from qvl.engine.probe import run_decoder
from qvl.layers.attention import make_kv_cache
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import ModelSpec, load_spec
from qvl.types import Grid

LAYERS, BLOCKS, BLOCK_SIZE, CONTEXT, STREAMS = 6, 2, 16, 96, 8
PICTURE, PROMPT = Grid(1, 32, 32), 293  # 448 x 448 pixels, and its tokens with a short question


def load(spec: ModelSpec, quantization: str) -> Any:
    model = build_model(spec, torch.bfloat16, "cpu", "none" if quantization == "bf16" else quantization)
    load_weights(model, spec.folder, load_format="dummy")
    return model


def parts(model: Any) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    spec = model.spec
    kv = make_kv_cache(spec.text, 1, BLOCK_SIZE, model.dtype, "cpu")
    pixels, merged = torch.randn(PICTURE.num_patches, spec.vision.patch_dim), torch.randn(PICTURE.num_patches, 1280)
    one, many = torch.randn(1, spec.text.hidden_size), torch.randn(STREAMS, spec.text.hidden_size)
    return {
        "token": lambda: run_decoder(model, kv, [1], CONTEXT, BLOCK_SIZE),
        "head": lambda: model.logits(one),
        "tokens": lambda: run_decoder(model, kv, [1] * STREAMS, CONTEXT, BLOCK_SIZE),
        "heads": lambda: model.logits(many),
        "prompt": lambda: run_decoder(model, kv, [PROMPT], PROMPT, BLOCK_SIZE),
        "vision": lambda: model.encode_media(pixels, [PICTURE]),
        "ends": lambda: (model.visual.patch_embed(pixels), model.visual.merger(merged)),
    }


def whole(least: dict[str, float], full: ModelSpec) -> tuple[float, float, float]:
    """Seconds of the full model: a token, a step of all streams, the first token after the picture."""
    deep, tall = full.text.num_layers / LAYERS, full.vision.depth / BLOCKS
    vision = (least["vision"] - least["ends"]) * tall + least["ends"]
    token, step = least["token"] * deep + least["head"], least["tokens"] * deep + least["heads"]
    return token, step, vision + least["prompt"] * deep + least["head"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        full = load_spec(write_shape("2b", Path(folder) / "2b"))
        text, vision = dataclasses.replace(full.text, num_layers=LAYERS), dataclasses.replace(full.vision, depth=BLOCKS)
        cut = dataclasses.replace(full, text=text, vision=vision)
        timed = {name: parts(load(cut, name)) for name in ("bf16", "int8", "int4")}
    least: dict[str, dict[str, float]] = {name: {} for name in timed}
    stop, turn = time.monotonic() + seconds, 0
    while turn < 2 or time.monotonic() < stop:
        for name, actions in timed.items():
            for part, action in actions.items():
                if turn % 5 and part in ("prompt", "vision", "ends"):
                    continue
                start = time.thread_time()
                action()
                least[name][part] = min(time.thread_time() - start, least[name].get(part, float("inf")))
        turn += 1
    base = whole(least["bf16"], full)
    print(f"{describe('cpu')}; 1 thread, {turn} turns\n")
    print(f"| | per token | {STREAMS} streams, per step | tokens/s of {STREAMS} / of one | picture to first token |")
    print("|---|---|---|---|---|")
    for name, found in least.items():
        token, step, first = whole(found, full)
        gains = [f" ({a / b:.2f}x)" if name != "bf16" else "" for a, b in zip(base, (token, step, first), strict=True)]
        print(f"| {name} | {token * 1e3:.0f} ms{gains[0]} | {step * 1e3:.0f} ms{gains[1]} |", end="")
        print(f" {STREAMS * token / step:.2f} | {first:.1f} s{gains[2]} |")


if __name__ == "__main__":
    main()
