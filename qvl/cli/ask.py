"""`qvl ask`: one question about pictures, answered by the running server or, where none runs, in this process.

Knows where an answer can come from and how it is printed. Does not know how it is computed.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from qvl.client import DEFAULT_URL, Client, collect, media_kind, question
from qvl.errors import InvalidRequest, QvlError
from qvl.types import Delta, MediaPart, Message, SamplingParams

DEFAULT_MAX_TOKENS = 1024
PROBE_SECONDS = 2.0


def ask(
    text: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    media: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FILE|URL]...", help="Pictures and videos; - reads one from standard input."),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            envvar="QVL_BASE_URL", help=f"The server to ask [default: {DEFAULT_URL} if it answers, else none]"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A name the server serves, or a checkpoint folder to load here [default: demo]")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = DEFAULT_MAX_TOKENS,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [default: the checkpoint's]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="QVL_API_KEY", help="The server's key.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object when the answer is complete.")] = False,
) -> None:
    """Ask one question about pictures or videos and stream the answer.

    Text piped in is added to the question when no file is named: `cat page.txt | qvl ask "Summarise this."`
    """
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
    messages = question(*_read_question(text, media or []), system)
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
    elif not media and _is_piped(stdin):
        piped = _decode(stdin.read()).strip()
        text = f"{text}\n\n{piped}" if piped else text
    return text, [_medium(item, stdin) for item in media]


def _is_piped(stdin: BinaryIO) -> bool:
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
    path = Path(item).expanduser()
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
    local = _local_server(model, api_key)
    if local is not None:
        return f"{local.model} at {local.base_url}", local.stream(messages, sampling)
    name = model or "demo"
    print(f"qvl: no server at {DEFAULT_URL} serves {model or 'a model'}; loading {name} here", file=sys.stderr)
    from qvl.engine.llm import LLM  # torch loads only where no server can answer

    return f"{name} in process", LLM(name).stream(messages, sampling)


def _local_server(model: str | None, api_key: str | None) -> Client | None:
    """The server on this machine's default port, when it is ready and serves `model`."""
    probe = Client(DEFAULT_URL, api_key=api_key, timeout=PROBE_SECONDS)
    try:
        names = probe.models() if probe.ready() else []
    except QvlError:
        names = []
    finally:
        probe.close()
    if not names or (model is not None and model not in names):
        return None
    return Client(DEFAULT_URL, model=model or names[0], api_key=api_key)


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
