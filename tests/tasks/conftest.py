"""The bundled checkpoint in this process, loaded once for all tests of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qvl import LLM


@pytest.fixture(scope="session")
def demo() -> LLM:
    from qvl import LLM

    return LLM("demo", num_threads=1)


@pytest.fixture
def samples() -> Path:
    return Path(__file__).resolve().parents[2] / "samples"
