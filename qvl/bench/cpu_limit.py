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

from qvl.bench.measure import Prompt
from qvl.kernels.linear import linear
from qvl.media.resize import smart_resize
from qvl.specs import ModelSpec

MATRIX_BYTES = 512 << 20  # more than caches hold
MATRIX_WIDTH = 4096
TURNS = 5


class CpuLimit:
    """The faster of torch's and qvl's own products, of each kind; weights have 16 bits."""

    name = "limit"

    def __init__(self, spec: ModelSpec, dtype: torch.dtype) -> None:
        self._spec = spec
        self._token_bytes = _token_bytes(spec)
        plain = torch.randn(MATRIX_BYTES // (4 * MATRIX_WIDTH), MATRIX_WIDTH)
        self._matrices = [plain, torch.empty(MATRIX_BYTES // (2 * MATRIX_WIDTH), MATRIX_WIDTH, dtype=dtype).fill_(0.5)]
        width, rows = spec.text.hidden_size, 2 * spec.text.intermediate_size
        self._wide = [torch.randn(rows, width), torch.randn(rows, width).to(dtype)]

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
        return MATRIX_BYTES / min(_seconds(_product(torch.randn(1, MATRIX_WIDTH), one)) for one in self._matrices)

    def rate(self, rows: int) -> float:
        """Operations a second of a product with so many rows."""
        x = torch.randn(rows, self._spec.text.hidden_size)
        fastest = min(_seconds(_product(x, one)) for one in self._wide)
        return 2 * rows * self._wide[0].numel() / fastest

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


def _product(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    if weight.dtype == torch.float32:
        return lambda: F.linear(x, weight)
    return lambda: linear(x, weight)


def _seconds(product: Callable[[], torch.Tensor]) -> float:
    """The middle of some turns."""
    times = []
    for _ in range(TURNS):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
