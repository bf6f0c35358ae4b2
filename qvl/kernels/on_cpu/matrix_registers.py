"""Whether a CPU multiplies with registers for matrices (AMX). Does not know products."""

from __future__ import annotations

import functools
import os

import torch

# oneDNN's own settings, which torch's products obey: the most that a processor is taken to be able to
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@functools.cache
def has_matrix_registers() -> bool:
    """Whether torch uses AMX here, and so do we."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return supported is not None and bool(supported()) and not told_to_do_without()


def told_to_do_without() -> bool:
    """Whether `ONEDNN_MAX_CPU_ISA` names instructions of x86 without AMX, e.g. AVX512_CORE_BF16."""
    limit = next((os.environ[name] for name in LIMITS if os.environ.get(name)), "").upper()
    return limit.startswith(("SSE", "AVX")) and "AMX" not in limit
