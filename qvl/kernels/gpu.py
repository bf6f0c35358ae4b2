"""Whether this package's GPU kernels can be used here: Triton is there, and a first kernel compiles and runs.

Knows how to find out once, and to say once why not and what it costs. Does not know what the kernels compute.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

COST = "torch's own operations are used instead: several times slower per token"


@functools.cache
def gpu_problem() -> str | None:
    """Why Triton kernels cannot run on the current CUDA device, or None when they can. Warns once."""
    try:
        from qvl.kernels import triton_ops

        x = torch.ones(2, 16, device="cuda")
        if not torch.allclose(triton_ops.quick_gelu(x), x * torch.sigmoid(1.702 * x)):
            return _warn("a first kernel gave wrong numbers")
    except ImportError as error:
        return _warn(f"Triton cannot be imported ({error})")
    except Exception as error:  # noqa: BLE001  # a compiler, a driver or a linker: each raises what it likes
        return _warn(f"a first kernel did not build ({type(error).__name__}: {str(error).splitlines()[0][:200]})")
    return None


def gpu_kernels() -> ModuleType | None:
    """`qvl.kernels.triton_ops` when it can be used."""
    if gpu_problem() is not None:
        return None
    from qvl.kernels import triton_ops

    return triton_ops


def _warn(reason: str) -> str:
    logger.warning("no GPU kernels: %s; %s", reason, COST)
    return reason
