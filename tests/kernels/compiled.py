"""When a test of compiled C may be skipped: where nothing could have compiled it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from qvl.kernels.native import SWITCH, NativeUnavailable, find_compiler


def skip_without_compiler(error: NativeUnavailable | None = None) -> NoReturn:
    """There is no library (`error` says why). Where there is a compiler, that is a fault."""
    if os.environ.get(SWITCH) == "0":
        pytest.skip(f"{SWITCH}=0")
    try:
        find_compiler()
    except NativeUnavailable as missing:
        pytest.skip(str(missing))
    pytest.fail(f"there is a C compiler, but no library: {error or 'see the log'}")
