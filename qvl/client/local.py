"""The server on this machine, if there is one. Knows how long to look; does not know who answers instead."""

from __future__ import annotations

from qvl.client.blocking import Client
from qvl.errors import QvlError

PROBE_SECONDS = 2.0


def local_server(url: str, model: str | None, api_key: str | None) -> Client | None:
    """A client of the server at `url`, when it is ready and serves `model` (or anything, for None)."""
    probe = Client(url, api_key=api_key, timeout=PROBE_SECONDS, retries=0)
    try:
        names = probe.models() if probe.ready() else []
    except QvlError:
        names = []
    finally:
        probe.close()
    if not names or (model is not None and model not in names):
        return None
    return Client(url, model=model or names[0], api_key=api_key)
