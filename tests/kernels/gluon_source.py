"""A Gluon kernel compiled for compute capability 9.0 without a GPU, as a launch of it would be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qvl.kernels.gpu import HOPPER


def compiled_for_hopper(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], aligned: Iterable[str], registers: int
) -> Any:
    """`types` by argument, `aligned`: those at a multiple of 16. What Triton gives for it, four warps a program."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    source = GluonASTSource(
        fn=kernel,
        signature=dict(types) | dict.fromkeys(constants, "constexpr"),
        constexprs=dict(constants),
        attrs={(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    major, minor = HOPPER
    options = {"num_warps": 4, "maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", major * 10 + minor, 32), options=options)
