"""The kernels that choose tokens, compiled for GPUs that nobody has to own. tests/engine/test_gpu_sampler.py has their
numbers.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from tests.kernels.test_compile import cache, compiled

__all__ = ["cache"]

FOUND = ("stats_ptr", "pivots_ptr", "weights_ptr")
TYPES = {
    "logits_ptr": "*bf16",
    "counts_ptr": "*i16",
    "keys_ptr": "*i64",
    "candidates_ptr": "*i64",
    "tokens_ptr": "*i64",
}
TYPES |= {"healthy_ptr": "*i64", "vocab": "i32", "parts": "i32"} | dict.fromkeys(FOUND, "*fp32")


# Each on another generation: together they use everything that is used.
@pytest.mark.parametrize(
    ("name", "capability"),
    [("_best", (8, 9)), ("_scan", (7, 5)), ("_narrow", (8, 0)), ("_gather", (9, 0)), ("_choose", (12, 0))],
)
def test_it_builds_and_keeps_its_numbers_in_registers(name: str, capability: tuple[int, int]) -> None:
    from qvl.kernels.on_gpu import sampling, sampling_scores

    kernel: Any = getattr(sampling_scores if name == "_best" else sampling, name)
    constants: dict[str, Any] = {"BLOCK": sampling.AT_A_TIME if name == "_choose" else sampling_scores.BLOCK}
    constants |= {"PARTS": 64, "ID_BITS": 18, "ROUND": 1}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {key: TYPES.get(key, "*i32") for key in kernel.arg_names if key not in constants}
    if capability < (8, 0):
        types["logits_ptr"] = "*fp16"
    built = compiled(kernel, capability, types, constants, {"num_warps": sampling_scores.WARPS})
    assert built.metadata.shared <= 16 * 1024
    assert not re.search(r"\.local\s", built.asm["ptx"])  # what does not fit into registers or is indexed at run time
