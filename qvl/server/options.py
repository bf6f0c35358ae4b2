"""ServerOptions: every number of the HTTP side, checked once. Does not know the engine's options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from qvl.errors import ConfigError

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """How the HTTP server listens and what it bounds.

    `served_model_names`: empty for the backend's own; more than one are aliases, answers carry the first.
    `max_queue`: requests that may wait beyond those the backend computes at once; above it callers get 429.
    `max_body_bytes` bounds one body, `max_total_body_bytes` all bodies held at a time, `max_header_bytes` the request
    line and headers together. `header_seconds`: time a client has to send its headers; `stall_seconds`: time it may go
    without sending the next piece of its body or reading the next piece of its answer, before the connection is cut.
    `drain_seconds`: time that running requests get to finish after SIGTERM. `overflow`: what becomes of a conversation
    that is too long for the model, where its request does not say; `summary_seconds` bounds what a summary may take.
    `allowed_hosts`: names in the Host header that are served beside this machine's own ("*" for all), where the server
    listens on the loopback address and asks for no key.
    Raises `ConfigError` naming the option that cannot work.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    served_model_names: tuple[str, ...] = ()
    max_body_bytes: int = 128 * MIB
    max_total_body_bytes: int = 1024 * MIB
    max_header_bytes: int = 64 * 1024
    max_queue: int = 256
    header_seconds: float = 30.0
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    overflow: Literal["error", "window", "summary"] = "error"
    summary_seconds: float = 60.0
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    log_level: str = "warning"
    access_log: bool = False

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", "from 0 (any free port) to 65535")
        for name in ("max_body_bytes", "max_total_body_bytes", "max_header_bytes"):
            _require(getattr(self, name) > 0, name, "above 0")
        _require(self.max_queue >= 0, "max_queue", "at least 0")
        _require(self.header_seconds > 0, "header_seconds", "above 0")
        _require(self.stall_seconds > 0, "stall_seconds", "above 0")
        _require(self.drain_seconds >= 0, "drain_seconds", "at least 0")
        _require(self.overflow in ("error", "window", "summary"), "overflow", "error, window or summary")
        _require(self.summary_seconds > 0, "summary_seconds", "above 0")
        _require(all(self.api_keys), "api_keys", "non-empty strings")
        _require(all(self.served_model_names), "served_model_names", "non-empty strings")
        root_ok = not self.root_path or (self.root_path.startswith("/") and not self.root_path.endswith("/"))
        _require(root_ok, "root_path", "empty, or a path that starts with a slash and does not end with one")
        levels = ("critical", "error", "warning", "info", "debug")
        _require(self.log_level in levels, "log_level", f"one of {', '.join(levels)}")


def _require(ok: bool, name: str, says: str) -> None:
    if not ok:
        raise ConfigError(f"option '{name}' must be {says}", param=name)
