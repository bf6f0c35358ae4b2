"""Where the answer to `qvl ask` comes from, and how it is printed.

A named server answers, else the one on this machine's default port, else the model is loaded here. Does not know flags.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from qvl.client import Client, collect, local_server, media_kind, question
from qvl.errors import InvalidRequest
from qvl.types import DEFAULT_URL, Delta, MediaPart, Message, SamplingParams


def answer(
    text: str,
    media: Sequence[str],
    system: str | None,
    sampling: SamplingParams,
    *,
    base_url: str | None,
    model: str | None,
    api_key: str | None,
    as_json: bool,
) -> None:
    """Ask and print. Raises `QvlError`s; what was printed until then stays."""
    messages = question(*_read_question(text, media), system)
    source, deltas = _choose(base_url, model, api_key, messages, sampling)
    if as_json:
        _print_json(source, deltas)
    else:
        _print_stream(deltas)


def _read_question(text: str, media: Sequence[str]) -> tuple[str, list[Any]]:
    """The question's text and its media, with standard input where it is asked for."""
    stdin = sys.stdin.buffer
    if text == "-":
        if "-" in media:
            raise InvalidRequest("standard input can be the question or a picture, not both")
        text = _decode(stdin.read())
    elif not media and is_piped(stdin):
        piped = _decode(stdin.read()).strip()
        text = f"{text}\n\n{piped}" if piped else text
    elif not media and os.path.isfile(text):
        raise InvalidRequest(f"'{text}' is a file, and the question comes before it: qvl ask QUESTION {text}")
    return text, [_medium(item, stdin) for item in media]


def is_piped(stdin: BinaryIO) -> bool:
    """Whether someone redirected a file or a pipe into us; a terminal or /dev/null has nothing to say."""
    try:
        mode = os.fstat(stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("standard input is not text; name a picture on it with: qvl ask QUESTION -") from None


def _medium(item: str, stdin: BinaryIO) -> MediaPart:
    if item == "-":
        return MediaPart("image", stdin.read())
    if "://" in item or item.startswith("data:"):
        return MediaPart(media_kind(item), item)
    path = Path(os.path.expanduser(item))
    if not path.is_file():
        raise InvalidRequest(f"no such file: {item}")
    return MediaPart(media_kind(path), path)


def _choose(
    base_url: str | None,
    model: str | None,
    api_key: str | None,
    messages: tuple[Message, ...],
    sampling: SamplingParams,
) -> tuple[str, Iterator[Delta]]:
    """Who answers (for the reader of --json), and the answer."""
    if base_url is not None:
        client = Client(base_url, model=model, api_key=api_key)
        return f"{client.model} at {client.base_url}", client.stream(messages, sampling)
    local = local_server(DEFAULT_URL, model, api_key)
    if local is not None:
        return f"{local.model} at {local.base_url}", local.stream(messages, sampling)
    name = model or "demo"
    print(f"qvl: no server at {DEFAULT_URL} serves {model or 'a model'}; loading {name} here", file=sys.stderr)
    from qvl.engine.llm import LLM  # torch loads only where no server can answer

    return f"{name} in process", LLM(name).stream(messages, sampling)


def _print_stream(deltas: Iterator[Delta]) -> None:
    ended = True
    for delta in deltas:
        if delta.text:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            ended = delta.text.endswith("\n")
        if delta.finish_reason == "length":
            print("\nqvl: the answer was cut at --max-tokens", file=sys.stderr)
    if not ended:
        print()


def _print_json(source: str, deltas: Iterator[Delta]) -> None:
    completion = collect(deltas)
    usage = completion.usage
    print(
        json.dumps(
            {
                "text": completion.text,
                "finish_reason": completion.answers[0].finish_reason,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "answered_by": source,
            },
            ensure_ascii=False,
        )
    )
