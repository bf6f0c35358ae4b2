"""Who answers a conversation in the terminal: a server, or a model loaded here; and who counts its tokens.

Does not know the terminal. The order is that of `qvl ask`: a named server, else the one on this machine's default port,
else the model is loaded here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from qvl.client import Client, local_server
from qvl.errors import QvlError
from qvl.memory import ServerCounter, TokenCounter, UsageCounter
from qvl.types import DEFAULT_URL, Completion, Delta, Message, SamplingParams

UNTOLD_CONTEXT = 8192  # tokens; what to keep to with a server that does not say


@dataclass(frozen=True, slots=True)
class Voice:
    """`ask` and `stream` answer, `count` counts exactly, `context` is the most tokens of one request."""

    name: str
    place: str
    context: int
    ask: Callable[[tuple[Message, ...], SamplingParams], Completion]
    stream: Callable[[tuple[Message, ...], SamplingParams], Iterator[Delta]]
    count: TokenCounter


def find_voice(base_url: str | None, model: str | None, api_key: str | None) -> Voice:
    """Raises `Unavailable` when a named server does not answer."""
    client = (
        local_server(DEFAULT_URL, model, api_key)
        if base_url is None
        else Client(base_url, model=model, api_key=api_key)
    )
    if client is not None:
        return _of_server(client)
    name = model or "demo"
    print(f"qvl: no server at {DEFAULT_URL} serves {model or 'a model'}; loading {name} here", file=sys.stderr)
    return _of_this_process(name)


def _of_server(client: Client) -> Voice:
    name, context = client.model, client.context()
    count: TokenCounter
    try:
        client.tokens("?")
        count = ServerCounter(client.tokens)
    except QvlError:  # not one of ours: its `usage` tells
        count = UsageCounter(client.chat)
    return Voice(name, client.base_url, context or UNTOLD_CONTEXT, client.chat, client.stream, count)


def _of_this_process(name: str) -> Voice:
    from qvl.engine.llm import LLM  # torch loads only where no server can answer
    from qvl.memory import LocalCounter

    llm = LLM(name)
    config = llm.engine.config
    return Voice(
        config.served_name,
        "this process",
        config.max_model_len,
        llm.chat,
        llm.stream,
        LocalCounter(config, llm.tokenizer),
    )
