"""Registers for matrices (AMX): whoever keeps torch's products from using them keeps ours from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu.linear_codes import computes_right, open_library, path_of
from qvl.kernels.on_cpu.matrices import WITHOUT_AMX
from qvl.kernels.on_cpu.matrix_registers import LIMITS, has_matrix_registers


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    has_matrix_registers.cache_clear()
    yield
    has_matrix_registers.cache_clear()


@pytest.mark.parametrize("limit", ["", "DEFAULT", "ALL", "AVX512_CORE_AMX", "avx10_1_512_amx_fp16"])
def test_a_limit_that_allows_them_changes_nothing(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_matrix_registers()


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("limit", ["AVX512_CORE_BF16", "avx512_core_vnni", "AVX2", "SSE41"])
def test_a_limit_below_them_is_obeyed(name: str, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, limit)
    assert not has_matrix_registers()


def test_a_processor_without_them_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not has_matrix_registers()


def test_products_of_codes_obey_the_same_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    try:
        library = open_library()
    except NativeUnavailable as reason:
        pytest.skip(str(reason))
    assert "AMX" not in path_of(library)
    assert computes_right(library)


def test_the_limit_is_an_option_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[str, ...]] = []

    def refuse(source: Path, flags: tuple[str, ...]) -> None:
        built.append(flags)
        raise NativeUnavailable("only looking")

    monkeypatch.setattr("qvl.kernels.on_cpu.matrices.load_native", refuse)
    for limit in ("", "AVX512_CORE_BF16"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        with pytest.raises(NativeUnavailable):
            open_library()
    assert [WITHOUT_AMX[0] in flags for flags in built] == [False, True]
