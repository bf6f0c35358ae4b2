"""In which numbers a CPU attends within prompts and pictures, where torch multiplies all keys with all queries.

Does not know layers.
"""

from __future__ import annotations

import torch

from qvl.kernels.on_cpu.matrix_registers import has_matrix_registers


def attention_dtype(numbers: torch.dtype, compute: torch.dtype) -> torch.dtype:
    """That of the weights or the cache, `numbers`, where it is faster than `compute`, in which activations come.

    With registers for matrices (AMX) torch takes 9 ms in bf16 for what takes it 25 in fp32: a layer of the tower at
    1,024 patches. Without them bf16 gains nothing.
    """
    narrow = numbers == torch.bfloat16 and compute == torch.float32
    return numbers if narrow and has_matrix_registers() else compute
