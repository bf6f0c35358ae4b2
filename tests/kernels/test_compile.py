"""The Triton kernels compiled for GPUs that nobody has to own: they build, and fit into the shared memory there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qvl.kernels.gpu import KIB, early_on, shared_memory, tiles_for

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv", torch.float32: "fp32"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled anew, and left nowhere."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    kernel: Any, capability: tuple[int, int], types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]
) -> Any:
    """`types` are those of the arguments that are no constants; pointers and sizes are multiples of 16, as they are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = types | dict.fromkeys(constants, "constexpr")
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith("_ptr") or name in "nk"
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options)


def attention(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, *, decode: bool) -> Any:
    """For seven query heads a KV head, as in the 7B."""
    from qvl.kernels.on_gpu import attention_cut, attention_decode, attention_prefill

    tiles = tiles_for(capability, dtype, head_dim)
    number = "*" + TYPES[dtype]
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), number)
    types |= {"table_ptr": "*i32", "table_stride": "i32", "scale": "fp32"}
    constants = {"KH": 4, "D": head_dim, "PAGE": 16, "GROUP": 7, "EARLY": tiles.early}
    early = {"launch_pdl": True} if tiles.early else {}
    if not decode:
        constants |= {"ROWS": tiles.rows, "BLOCK": tiles.block, "FIELDS": attention_prefill.FIELDS}
        options: dict[str, Any] = {"num_warps": tiles.warps, "num_stages": tiles.stages} | early
        return compiled(attention_prefill._prefill, capability, types | {"tiles_ptr": "*i32"}, constants, options)
    types |= {"beside": "i32", "items_ptr": "*i32", "part_ptr": "*fp32", "weight_ptr": "*fp32"}
    types |= dict.fromkeys(("joins_ptr", "arrived_ptr"), "*i32")
    constants |= {"ROWS": tiles.decode_rows(7), "BLOCK": tiles.decode_block}
    constants |= {"MERGE": attention_decode.MERGE_SPAN, "HEADS": 8}
    constants |= {"ITEM_FIELDS": attention_cut.ITEM_FIELDS, "JOIN_FIELDS": attention_cut.JOIN_FIELDS}
    options = {"num_warps": tiles.decode_warps, "num_stages": tiles.decode_stages} | early
    return compiled(attention_decode._decode, capability, types, constants, options)


def test_the_cut_and_the_join_build() -> None:
    from qvl.kernels.on_gpu import attention_cut, attention_decode

    constants = {"EARLY": True}
    options = {"num_warps": 4, "launch_pdl": True}
    types = dict.fromkeys(("lens_ptr", "items_ptr", "joins_ptr", "arrived_ptr"), "*i32")
    types |= dict.fromkeys(("batch", "count", "most"), "i32")
    numbers = {"KH": 4, "PLACES": 4, "BATCH": 256, "BLOCK": 32, "LEAST": attention_cut.LEAST, "MOST_PARTS": 32}
    fields = {"ITEM_FIELDS": attention_cut.ITEM_FIELDS, "JOIN_FIELDS": attention_cut.JOIN_FIELDS}
    ptx = compiled(attention_cut._cut, (9, 0), types, numbers | fields | constants, options).asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("ld.global")
    types = {"part_ptr": "*fp32", "weight_ptr": "*fp32", "joins_ptr": "*i32", "out_ptr": "*bf16"}
    numbers = {"H": 28, "D": 128, "SPAN": attention_decode.JOIN_SPAN, "JOIN_FIELDS": attention_cut.JOIN_FIELDS}
    for first in (False, True):
        built = compiled(attention_decode._join, (9, 0), types, numbers | constants | {"FIRST": first}, options)
        ptx = built.asm["ptx"]
        let_in, wait = ptx.index("griddepcontrol.launch_dependents"), ptx.index("griddepcontrol.wait")
        assert (let_in < wait) == first
        assert max(let_in, wait) < ptx.index("st.global")


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_patches_build(capability: tuple[int, int]) -> None:
    from qvl.kernels.on_gpu import pixel_patches

    types = {"pixels_ptr": "*u8", "starts_ptr": "*i32", "weights_ptr": "*i32", "width": "i32", "taps": "i32"}
    compiled(
        pixel_patches._across, capability, types | {"out_ptr": "*u8", "wide": "i32"}, {"BLOCK": pixel_patches.BLOCK}, {}
    )
    types |= dict.fromkeys(("count", "tall", "height"), "i32")
    types |= dict.fromkeys((f"{name}{i}" for name in ("mean", "std") for i in range(3)), "fp32")
    constants = {"PATCH": 14, "FRAMES": 2, "MERGE": 2, "SIZE": 1176, "BLOCK": 2048}
    kernel = compiled(pixel_patches._down, capability, types | {"out_ptr": "*fp16"}, constants, {"num_warps": 4})
    assert "st.global" in kernel.asm["ptx"]


# At the end: which instruction multiplies there. 10.3 has the tiles of 10.0.
@pytest.mark.parametrize(
    ("capability", "head_dim", "decode", "instruction"),
    [
        ((7, 5), 128, True, "fma"),
        ((8, 0), 128, False, "mma.sync"),
        ((8, 6), 128, False, "mma.sync"),
        ((8, 6), 256, False, "mma.sync"),
        ((8, 9), 128, False, "mma.sync"),
        ((9, 0), 128, False, "wgmma"),
        ((9, 0), 128, True, "mma.sync"),
        ((10, 0), 128, False, "tcgen05"),
        ((12, 0), 128, False, "mma.sync"),
    ],
)
def test_attention_fits(capability: tuple[int, int], head_dim: int, decode: bool, instruction: str) -> None:
    dtype = torch.float16 if capability < (8, 0) else torch.bfloat16
    kernel = attention(capability, dtype, head_dim, decode=decode)
    assert kernel.metadata.shared <= shared_memory(capability)
    assert instruction in kernel.asm["ptx"]
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == early_on(capability)
    if early_on(capability) and not decode:  # decodes run beside it, and rely on what it has waited for
        let_in, wait, load = (kernel.asm["ptx"].index(word) for word in (".launch_dependents", ".wait;", "ld.global"))
        assert wait < let_in < load


def product(capability: tuple[int, int], weights: torch.dtype, width: int) -> Any:
    """One row times gate_up_proj of the 7B with the norm in front, or of a wider model."""
    from qvl.kernels.on_gpu import linear_row

    dtype = torch.float16 if capability < (8, 0) else torch.bfloat16
    number, shape = "*" + TYPES[dtype], linear_row.shape_for(37888, width, torch.device("cpu"))
    types = {"x_ptr": number, "w_ptr": "*" + TYPES[weights], "scales_ptr": "*fp32"}
    types |= dict.fromkeys(("norm_ptr", "bias_ptr", "residual_ptr", "out_ptr"), number)
    types |= {"n": "i32", "k": "i32", "eps": "fp32"}
    constants = {"ROWS": shape.rows, "BLOCK": shape.block, "WHOLE": width <= shape.block, "NORM": True, "GATED": True}
    constants |= {"SCALED": weights == torch.float8_e4m3fn, "BIAS": False, "RESIDUAL": False}
    constants["EARLY"] = early = early_on(capability)
    options = {"num_warps": shape.warps, "maxnreg": linear_row.REGISTERS} | ({"launch_pdl": True} if early else {})
    return compiled(linear_row._product, capability, types, constants, options)


@pytest.mark.parametrize("width", [3584, 8192])
@pytest.mark.parametrize(
    ("capability", "weights"),
    [((7, 5), torch.float16), ((9, 0), torch.bfloat16), ((8, 9), torch.float8_e4m3fn)],
)
def test_weights_are_read_sixteen_bytes_at_a_time(
    capability: tuple[int, int], weights: torch.dtype, width: int
) -> None:
    kernel = product(capability, weights, width)
    assert kernel.metadata.shared <= 8 * KIB  # sums, and x on its way to its threads
    found = re.findall(r"ld\.global[.\w:]*evict_first[.\w:]*\.v(\d)\.b(\d+)", kernel.asm["ptx"])
    assert found
    assert {int(count) * int(bits) // 8 for count, bits in found} == {16}


def test_a_row_that_fits_into_registers_is_shared_by_as_many_programs_as_run_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qvl.kernels.on_gpu.linear_row import Shape, shape_for

    monkeypatch.setattr("qvl.kernels.on_gpu.linear_row.multiprocessors", lambda _: 132)
    shapes = [
        shape_for.__wrapped__(rows, k, torch.device("cuda")) for rows, k in ((37888, 3584), (8960, 1536), (6, 64))
    ]
    assert shapes == [Shape(2, 4096, 8, 528), Shape(2, 2048, 4, 1056), Shape(2, 512, 1, 3)]
    assert shape_for.__wrapped__(3584, 18944, torch.device("cuda")) == Shape(2, 2048, 8, 1792)


def test_a_row_in_fp8_builds_where_fp8_is() -> None:
    from qvl.kernels.on_gpu.ops import ROUND_BLOCK, ROUND_WARPS, _silu_and_round

    types = {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scales_ptr": "*fp32", "size": "i32"}
    constants = {"PIECES": 5, "EARLY": False, "BLOCK": ROUND_BLOCK}
    kernel = compiled(_silu_and_round, (8, 9), types, constants, {"num_warps": ROUND_WARPS})
    assert kernel.metadata.shared <= shared_memory((8, 9))
