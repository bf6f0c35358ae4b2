"""What a CPU could do at best, as a subject of measurement: bytes of weights over the bandwidth of a product with one
row, operations over the rate of a product with many. Both are measured anew each time it is asked, in turn with the
engine, so that whatever else runs on the machine slows both.

Knows a model's arithmetic and products of plain matrices. Does not know how the engine computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qvl.bench.measure import Prompt
from qvl.kernels.linear import empty_matrix, form_of_numbers, linear
from qvl.media.resize import smart_resize
from qvl.specs import ModelSpec

MATRIX_BYTES = 512 << 20  # more than caches hold
MATRIX_WIDTH = 4096
ROWS_AT_ONCE = 1024  # of a matrix that is written
TURNS = 5


class CpuLimit:
    """The faster of torch's and qvl's own products, of each kind; weights have 16 bits."""

    name = "limit"

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec = spec
        self._token_bytes = _token_bytes(spec)
        plain = torch.randn(MATRIX_BYTES // (4 * MATRIX_WIDTH), MATRIX_WIDTH)
        half = torch.tensor(0.5, dtype=dtype).expand(MATRIX_BYTES // (2 * MATRIX_WIDTH), MATRIX_WIDTH)
        self._products = [_product_with(plain), _product_with(half)]
        width, rows = spec.text.hidden_size, 2 * spec.text.intermediate_size
        self._numbers = rows * width
        self._wide = [_product_with(torch.randn(rows, width)), _product_with(torch.randn(rows, width).to(dtype))]

    def generate(self, prompt: Prompt, num_tokens: int) -> list[float]:
        """As `Subject.generate`, by arithmetic."""
        operations = self._spec.prefill_flops(len(prompt.token_ids))
        rows = len(prompt.token_ids)
        if prompt.picture is not None:
            patches = self._patches(prompt.picture.shape[0], prompt.picture.shape[1])
            rows += 2 + patches // self._spec.processor.merge_size**2
            operations = self._spec.prefill_flops(rows) + self._spec.vision_flops(patches)
        first = operations / self.rate(rows)
        step = self._token_bytes / self.bandwidth() if num_tokens > 1 else 0.0
        return [first + step * i for i in range(num_tokens)]

    def bandwidth(self) -> float:
        """Bytes a second that a product of one row reads."""
        x = torch.randn(1, MATRIX_WIDTH)
        return MATRIX_BYTES / min(_seconds(product, x) for product in self._products)

    def rate(self, rows: int) -> float:
        """Operations a second of a product with so many rows."""
        x = torch.randn(rows, self._spec.text.hidden_size)
        return 2 * rows * self._numbers / min(_seconds(product, x) for product in self._wide)

    def _patches(self, height: int, width: int) -> int:
        processor = self._spec.processor
        factor = processor.patch_size * processor.merge_size
        height, width = smart_resize(
            height, width, factor=factor, min_pixels=processor.min_pixels, max_pixels=processor.max_pixels
        )
        return height * width // processor.patch_size**2


def _token_bytes(spec: ModelSpec) -> int:
    """What one token must read: every matrix of the decoder once, and the output head."""
    text = spec.text
    return 2 * (text.num_layers * text.layer_matrix_parameters + text.vocab_size * text.hidden_size)


def _product_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """torch's product with a matrix in fp32, qvl's with another, in the form that the engine would hold it in."""
    if weight.dtype == torch.float32:
        return lambda x: F.linear(x, weight)
    form = form_of_numbers(weight.dtype, weight.device)
    if form is None:
        whole = weight.contiguous()
        return lambda x: linear(x, whole)
    rows, width = weight.shape
    matrix = empty_matrix(form, rows, width, weight.device)
    for first in range(0, rows, ROWS_AT_ONCE):
        matrix.write(first, weight[first : first + ROWS_AT_ONCE])
    return lambda x: matrix.product(x, None)


def _seconds(product: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The middle of some turns."""
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        product(x)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
