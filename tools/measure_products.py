"""What each matrix of a decoder takes on this CPU: `python tools/measure_products.py [--threads 2] [--seconds 20]`.

The 2B's matrices, four of each so that no cache holds them, in bf16, int8 and int4, in turn. Of all turns the time that
a twelfth were faster than, and of the head, which takes longer than a busy machine lets anyone run, the least. Another
tree of the code is measured with PYTHONPATH. Knows products alone: `qvl bench engine` measures tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent))

from qvl.kernels.linear import form_of_numbers
from qvl.kernels.on_cpu.linear_codes import QuantisedMatrix
from qvl.kernels.on_cpu.linear_floats import native_product
from qvl.kernels.on_cpu.linear_pairs import PairMatrix
from qvl.layers.linear import Linear
from qvl.models.parameters import allocate

SHAPES = {"qkv": (2048, 1536), "o": (1536, 1536), "gate_up": (17920, 1536), "down": (1536, 8960)}
SHAPES["head"] = (151936, 1536)
LAYERS, COPIES, FASTER = 28, 4, 12
Product = Callable[[Tensor], Tensor]


def product(form: str, rows: int, width: int) -> tuple[Product, int]:
    """A matrix to multiply with, and its bytes."""
    if form == "bf16" and form_of_numbers(torch.bfloat16, torch.device("cpu")) == "pairs":
        pairs = PairMatrix.empty(rows, width)
        pairs.numbers.fill_(0.5)
        return lambda x: pairs.product(x, None), 2 * pairs.numbers.numel()
    if form == "bf16":
        weight = empty_weight(rows, width).fill_(0.5)
        multiply = native_product(torch.bfloat16)
        return lambda x: multiply(x, weight, None), 2 * weight.numel()
    matrix = QuantisedMatrix.empty({"int8": 8, "int4": 4}[form], rows, width)
    matrix.codes.random_(-127, 127)
    matrix.scales.fill_(0.01)
    return lambda x: matrix.product(
        x, None
    ), matrix.codes.numel() + matrix.scales.numel() * matrix.scales.element_size()


def empty_weight(rows: int, width: int) -> Tensor:
    """In large pages, as the engine holds its own."""
    layer = Linear(width, rows, bias=False, dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert layer.weight is not None
    return allocate([layer.weight], torch.device("cpu"))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    timed = {
        (form, name): [product(form, *shape) for _ in range(1 if name == "head" else COPIES)]
        for form in ("bf16", "int8", "int4")
        for name, shape in SHAPES.items()
    }
    inputs = {name: torch.randn(options.rows, width) for name, (_, width) in SHAPES.items()}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    stop = time.monotonic() + options.seconds
    while not times or time.monotonic() < stop:
        for (form, name), matrices in timed.items():
            for multiply, _ in matrices:
                start = time.perf_counter()
                multiply(inputs[name])
                times[form, name].append(time.perf_counter() - start)
    report(timed, times)


def report(timed: dict[tuple[str, str], list[tuple[Product, int]]], times: dict[tuple[str, str], list[float]]) -> None:
    print(f"| | {' | '.join(SHAPES)} | all of a token |\n|---|{'---|' * (len(SHAPES) + 1)}")
    for form in ("bf16", "int8", "int4"):
        cells, token, read = [], 0.0, 0
        for name in SHAPES:
            found, size = sorted(times[form, name]), timed[form, name][0][1]
            seconds, count = (found[0], 1) if name == "head" else (found[len(found) // FASTER], LAYERS)
            token, read = token + count * seconds, read + count * size
            cells.append(f"{seconds * 1e3:.3f} ms, {size / seconds / 1e9:.1f} GB/s")
        print(f"| {form} | {' | '.join(cells)} | {token * 1e3:.0f} ms, {read / token / 1e9:.1f} GB/s |")


if __name__ == "__main__":
    main()
