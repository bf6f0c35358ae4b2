"""One EchoBackend server for all tests that do not change it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qvl.backends.echo import EchoBackend
from tests.server.live import Live, live


@pytest.fixture(scope="session")
def server() -> Iterator[Live]:
    with live(EchoBackend()) as running:
        yield running
