"""What tests of commands share: a server that repeats what it is asked, and none of the developer's own settings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qvl.backends.echo import EchoBackend
from tests.server.live import Live, live


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(EchoBackend("parrot")) as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_BASE_URL", raising=False)
    monkeypatch.delenv("QVL_API_KEY", raising=False)
