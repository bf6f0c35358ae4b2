"""Every GPU kernel at the shapes of a published size, beside torch's and beside what the GPU could do at best.

Knows shapes and the kernels. A section is a function that yields measurements.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.bench.gpu_timing import Row, copies, median_seconds, numbers, seconds_of
from qvl.bench.shape import SHAPES, Shape
from qvl.kernels import fp8, fused
from qvl.kernels.attention import choose_attention
from qvl.kernels.gpu import capability_of, early_on
from qvl.kernels.on_gpu import linear_row
from qvl.kernels.segments import Segments, preferred_order, segment_attention
from qvl.layers.attention import AttentionMetadata, Heads, PagedAttention

HEAD_DIM, PAGE = 128, 16
CUDA, DTYPE = torch.device("cuda"), torch.bfloat16
SIZE = DTYPE.itemsize
Matrices = list[tuple[str, int, int, int, bool, bool, bool]]  # name, rows, width, how often, norm, gated, residual


def matrices(shape: Shape) -> Matrices:
    """All that a decoded token is multiplied with."""
    q, kv = shape.num_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
    h, i, layers = shape.hidden_size, shape.intermediate_size, shape.num_layers
    return [
        ("qkv", q + 2 * kv, h, layers, True, False, False),
        ("o", h, q, layers, False, False, True),
        ("gate_up", 2 * i, h, layers, True, True, False),
        ("down", h, i, layers, False, False, True),
        ("head", shape.vocab_size, h, 1, False, False, False),
    ]


def products(shape: Shape) -> Iterator[Row]:
    """Few rows: the library's product alone; for one row ours with all that surrounds it, and overlapping launches."""
    early = early_on(capability_of(CUDA))
    for m in (1, 2, 4, 8):
        total: dict[str, float] = {}
        num_bytes = 0
        for name, rows, width, count, norm, gated, residual in matrices(shape):
            weights = [numbers(rows, width, scale=0.02) for _ in range(copies(SIZE * rows * width))]
            x, gain = numbers(m, width), numbers(width) if norm else None
            ours = partial(
                linear_row.product, x, norm=gain, gated=gated, residual=numbers(m, rows) if residual else None
            )
            ways = {"torch": [partial(F.linear, x, w) for w in weights]}
            if m == 1:
                ways["triton"] = [partial(ours, w) for w in weights]
                if early:
                    ways["overlapped"] = [partial(ours, w, early=True) for w in weights]
            for way, calls in ways.items():
                seconds = seconds_of(calls)
                total[way] = total.get(way, 0.0) + seconds * count
                yield Row("products", f"{m} rows, {name} {rows}x{width}, {way}", seconds, SIZE * rows * width)
            num_bytes += SIZE * rows * width * count
        for way, seconds in total.items():
            yield Row("products", f"{m} rows, ALL MATRICES OF A TOKEN, {way}", seconds, num_bytes)


def tuning(shape: Shape) -> Iterator[Row]:
    """The kernel for one row in other shapes than it takes by itself."""
    early = early_on(capability_of(CUDA))
    for name, rows, width, _, norm, gated, _ in matrices(shape):
        weights = [numbers(rows, width, scale=0.02) for _ in range(copies(SIZE * rows * width))]
        ours = partial(
            linear_row.product, numbers(1, width), norm=numbers(width) if norm else None, gated=gated, early=early
        )
        chosen = linear_row.shape_for(rows, width, CUDA)
        for cut in dict.fromkeys([chosen, *cuts(rows, width)]):
            seconds = seconds_of([partial(ours, w, shape=cut) for w in weights])
            label = f"{name}, {cut.rows} x {cut.block}, {cut.warps} warps, {cut.programs} programs"
            yield Row("tuning", f"{label}{' (chosen)' if cut == chosen else ''}", seconds, SIZE * rows * width)


def cuts(rows: int, width: int) -> Iterator[linear_row.Shape]:
    """A program for each group of rows; where rows fit into a block, also as many as may be resident."""
    count = linear_row.multiprocessors(CUDA)
    for each, block, warps in itertools.product((2, 4), (1024, 2048, 4096), (4, 8, 16)):
        groups = -(-rows // each)
        if width > block:
            if block < linear_row.WIDEST:
                yield linear_row.Shape(each, block, warps, groups)
            continue
        for resident in (16, 32, 48):
            yield linear_row.Shape(each, block, warps, min(groups, count * resident // warps))


def a_step(query: list[int], context: list[int]) -> tuple[AttentionMetadata, int]:
    """Sequences whose blocks lie scattered, decodes first; and how many blocks there are."""
    need = [-(-length // PAGE) for length in context]
    order = torch.split(torch.randperm(sum(need)), need)
    table = torch.zeros(len(need), max(need), dtype=torch.int32)
    slots = []
    for i, blocks in enumerate(order):
        table[i, : need[i]] = blocks
        at = torch.arange(context[i] - query[i], context[i])
        slots.append(blocks[at // PAGE] * PAGE + at % PAGE)
    step = AttentionMetadata(
        seq_lens=torch.tensor(context, dtype=torch.int32, device=CUDA),
        block_table=table.to(CUDA),
        slot_mapping=torch.cat(slots).to(CUDA),
        query_lens=query,
        context_lens=context,
        block_size=PAGE,
        num_decodes=sum(1 for n in query if n == 1),
    )
    return step, sum(need)


def attention(shape: Shape) -> Iterator[Row]:
    """Rotation, storing and attention of one layer; fresh prompts beside torch's kernels on contiguous keys."""
    heads = Heads(shape.num_heads, shape.num_kv_heads, HEAD_DIM)
    chosen, reason = choose_attention(CUDA, DTYPE, heads, capability_of(CUDA))
    print(f"attention: {reason}")
    for count, length in ((1, 400), (1, 1500), (1, 16000), (8, 1500), (64, 1500), (256, 660)):
        yield one_layer(chosen, heads, [1] * count, [length] * count)
    yield one_layer(chosen, heads, [1] * 64, [30_000] + [500] * 63)
    for query, context in (
        ([147], [147]),
        ([1454], [1454]),
        ([8192], [8192]),
        ([512], [8704]),
        ([531] * 15, [531] * 15),
    ):
        row = one_layer(chosen, heads, query, context)
        yield row
        if query == context and len(query) == 1:
            q, k, v = (numbers(1, h, query[0], HEAD_DIM) for h in (shape.num_heads, *[shape.num_kv_heads] * 2))
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        label = row.name.replace(chosen.name, "torch")
        yield Row("attention", label, median_seconds(call), row.num_bytes, row.operations)
        with preferred_order(DTYPE, capability_of(CUDA)):
            yield Row("attention", f"{label} cudnn", median_seconds(call), row.num_bytes, row.operations)


def one_layer(chosen: PagedAttention, heads: Heads, query: list[int], context: list[int]) -> Row:
    """Decodes as in a graph, prefills as launched."""
    step, blocks = a_step(query, context)
    n, width = sum(query), heads.num_heads * HEAD_DIM
    kv = (numbers(blocks, PAGE, heads.num_kv_heads, HEAD_DIM), numbers(blocks, PAGE, heads.num_kv_heads, HEAD_DIM))
    qkv, angle = numbers(n, width + 2 * heads.num_kv_heads * HEAD_DIM), torch.rand(n, 1, HEAD_DIM, device=CUDA)
    run = partial(chosen.run, qkv, (angle.cos(), angle.sin()), kv, chosen.plan(step))
    seconds = seconds_of([run] * 8) if chosen.graph_safe and query[0] == 1 else median_seconds(run)
    pairs = sum(q * (c - q) + q * (q + 1) / 2 for q, c in zip(query, context, strict=True))
    num_bytes = 2.0 * SIZE * (sum(context) * heads.num_kv_heads * HEAD_DIM + n * width)
    name = f"{len(query)} x {query[0]} at the end of {max(context)}, {chosen.name}"
    return Row("attention", name, seconds, num_bytes, 4.0 * pairs * width)


def pictures(shape: Shape) -> Iterator[Row]:
    """Rotation and attention of one layer of the tower, 16 heads of 80, and what the first of a new size costs."""
    for sizes in ([5476], [5476] * 3, [5476] * 8, [1024] * 32, [1024 + 4 * i for i in range(32)]):
        qkv, angles = numbers(sum(sizes), 3, 16, 80), angles_of_one(sum(sizes))
        work = (6.0 * SIZE * qkv.numel() / 3, 4.0 * sum(size**2 for size in sizes) * 1280)
        ours = Segments.of(sizes, CUDA, DTYPE, 80)
        label = f"{len(sizes)} pictures of {sizes[0]} patches" + (" and more" if sizes[0] != sizes[-1] else "")
        torchs = Segments(ours.groups, None, None, ours.longest)
        run = partial(segment_attention, qkv, angles)
        yield Row("pictures", f"{label}, torch's order", median_seconds(partial(run, torchs)), *work)
        with preferred_order(DTYPE, capability_of(CUDA)):
            yield Row("pictures", f"{label}, torch's best", median_seconds(partial(run, torchs)), *work)
            yield Row("pictures", f"{label}, ours", median_seconds(partial(run, ours)), *work)
    for length in (5000, 5040, 5080):
        qkv, angles = numbers(length, 3, 16, 80), angles_of_one(length)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with preferred_order(DTYPE, capability_of(CUDA)):
            segment_attention(qkv, angles, Segments.of([length], CUDA, DTYPE, 80))
        torch.cuda.synchronize()
        yield Row("pictures", f"first call at {length} patches", time.perf_counter() - start, 2.0 * SIZE * qkv.numel())


def angles_of_one(rows: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of an angle that does not let numbers grow."""
    return torch.ones(rows, 1, 80, device=CUDA), torch.zeros(rows, 1, 80, device=CUDA)


def between(shape: Shape) -> Iterator[Row]:
    """What stands between the products."""
    for n, eight in itertools.product((1, 64, 2304), (False, True)):
        x, residual = numbers(n, shape.hidden_size), numbers(n, shape.hidden_size)
        wide, to = numbers(n, 2 * shape.intermediate_size), " to fp8" if eight else ""
        if eight and fp8.fp8_problem(CUDA) is not None:
            continue
        norm = partial(fused.add_rms_norm, x, residual, numbers(shape.hidden_size), 1e-6, eight)
        gate = partial(fused.silu_and_mul, wide, eight)
        yield Row(
            "between", f"{n} rows, residual + norm{to}", seconds_of([norm] * 16), x.numel() * (7.0 if eight else 8.0)
        )
        yield Row(
            "between", f"{n} rows, SiLU * up{to}", seconds_of([gate] * 16), wide.numel() * (2.5 if eight else 3.0)
        )


def eight_bits(shape: Shape) -> Iterator[Row]:
    """fp8 products beside 16 bits."""
    problem = fp8.fp8_problem(CUDA)
    if problem is not None:
        print(f"no fp8 here: {problem}")
        return
    for m, (name, rows, width, *_) in itertools.product((1, 16, 64, 256, 2304, 8192), matrices(shape)[:-1]):
        plain = [numbers(rows, width, scale=0.02) for _ in range(copies(rows * width))]
        held = [fp8.Fp8Matrix.empty(rows, width, CUDA) for _ in plain]
        for matrix, values in zip(held, plain, strict=True):
            matrix.write(0, values)
        x: Tensor = numbers(m, width)
        rounded, work = fp8.round_rows(x), 2.0 * m * rows * width
        seconds = seconds_of([partial(F.linear, x, w) for w in plain])
        yield Row("fp8", f"{m} rows, {name}, 16 bits", seconds, float(SIZE * rows * width), work)
        seconds = seconds_of([partial(matrix.product, rounded, None) for matrix in held])
        yield Row("fp8", f"{m} rows, {name}, fp8", seconds, 1.0 * rows * width, work / 2)
        if m == 1:
            ours = partial(linear_row.product, x, early=early_on(capability_of(CUDA)))
            seconds = seconds_of([partial(ours, matrix.codes, scales=matrix.scales) for matrix in held])
            yield Row("fp8", f"{m} rows, {name}, fp8 weights, triton", seconds, 1.0 * rows * width)


SECTIONS = MappingProxyType(
    {
        "products": products,
        "attention": attention,
        "pictures": pictures,
        "between": between,
        "fp8": eight_bits,
        "tuning": tuning,
    }
)


def measure(name: str, section: str) -> Iterator[Row]:
    """The measurements of one section at one published size."""
    return SECTIONS[section](SHAPES[name])
