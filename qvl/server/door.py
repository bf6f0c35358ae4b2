"""Where a server listens, and the one line that says so: the first thing at a start, before anything large is imported.

Knows sockets. Does not know uvicorn or routes.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from qvl.errors import ConfigError
from qvl.server.options import ServerOptions

if TYPE_CHECKING:
    from qvl.backends.base import BackendInfo

BACKLOG = 2048
# After the running requests have ended (or were told that they will not), connections only have to be closed.
CLOSE_SECONDS = 3


def ready_line(url: str, info: BackendInfo, names: tuple[str, ...] = ()) -> str:
    """The one line that says where, what, on which device, in which precision, and how much fits at once."""
    name = (names or info.names)[0]
    full = info.kv_tokens / info.max_model_len if info.max_model_len else 0.0
    capacity = f"KV cache {info.kv_tokens:,} tokens = {full:.1f} requests of {info.max_model_len:,} tokens"
    what = f"model {name}  device {info.device}  dtype {info.dtype}"
    return f"qvl ready: {url}  {what}  {capacity}  ({info.load_seconds:.1f} s)"


def bind(options: ServerOptions, *, shared: bool = False) -> socket.socket:
    """A socket at the address of `options`; `shared` lets others of this user's that say so be bound there too.

    Raises `ConfigError` when that cannot be.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host or None, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        other = "; take another port: --port N, or 0 for any that is free" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(f"cannot listen on {options.host}:{options.port}: {reason}{other}", param="port") from error
    listener.set_inheritable(False)
    return listener


def url_of(options: ServerOptions, listener: socket.socket) -> str:
    """Where a browser on this machine finds it."""
    port = listener.getsockname()[1]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(options.host, options.host)
    return f"http://{f'[{host}]' if ':' in host and not host.startswith('[') else host}:{port}"
