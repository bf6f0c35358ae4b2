"""What a supervisor and its HTTP processes say to each other: one line each way, as JSON. Knows no processes."""

from __future__ import annotations

from typing import Any

import msgspec

from qvl.backends.base import BackendInfo
from qvl.server.options import ServerOptions

# In the environment: where counters that are added up lie. prometheus_client reads it when it is imported.
SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"


class Setup(msgspec.Struct, frozen=True):
    """What the parent says first. `table` and `row`: see `counts`; `folders`: where this process puts pixels."""

    options: ServerOptions
    engine: dict[str, Any]
    socket: str
    folders: list[str]
    table: str
    row: int
    processes: int


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this process says once: `info` when it answers requests, or what it ends of."""

    info: BackendInfo | None = None
    error: str | None = None
