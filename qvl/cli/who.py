"""Who answers a command: a named server, else the one on this machine's default port, else a model loaded here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvl.client import Client, Retries, local_server

if TYPE_CHECKING:
    from qvl.engine.llm import LLM


@dataclass(frozen=True, slots=True)
class Who:
    """A server, a name that it serves or a checkpoint to load here, the server's key; and questions at a time."""

    base_url: str | None = None
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class Found:
    """Who it is, and its name for people."""

    model: Client | LLM
    told: str


def find(who: Who, local_url: str, *, quiet: bool = False, retries: int | Retries = 2) -> Found:
    """`local_url` is where a server of this machine is looked for. Raises `Unavailable` when a named one is silent.

    `retries` are for questions; whether a server is there at all is asked now, and once.
    """
    found = None
    if who.base_url is not None:
        with Client(who.base_url, model=who.model, api_key=who.api_key, retries=0) as asked:
            found = asked.base_url, asked.model
    else:
        local = local_server(local_url, who.model, who.api_key)
        if local is not None:
            found = local.base_url, local.model
            local.close()
    if found is not None:
        url, name = found
        return Found(Client(url, model=name, api_key=who.api_key, retries=retries), f"{name} at {url}")
    name = who.model or "demo"
    if not quiet:
        print(f"qvl: no server at {local_url} serves {who.model or 'a model'}; loading {name} here", file=sys.stderr)
    from qvl.engine.llm import LLM  # torch loads only where no server can answer

    return Found(LLM(name), f"{name} in process")
