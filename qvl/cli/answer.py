"""Where the answer to `qvl ask` comes from, and how it is printed.

A named server answers, else the one on this machine's default port, else the model is loaded here. Does not know flags.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Literal

from qvl.cli.who import Who, find
from qvl.client import collect, media_kind, question, screen_part
from qvl.errors import InvalidRequest
from qvl.types import DEFAULT_URL, Completion, Delta, MediaPart, Message, PixelLimits, SamplingParams
from qvl.wire import LOW_DETAIL_PIXELS


@dataclass(frozen=True, slots=True)
class Look:
    """How closely pictures and videos are looked at."""

    detail: Literal["auto", "low", "high"] = "auto"
    fps: float | None = None


def answer(
    text: str,
    media: Sequence[str],
    system: str | None,
    sampling: SamplingParams,
    who: Who,
    look: Look = Look(),
    *,
    schema: Path | None = None,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Ask and print. Raises `QvlError`s; what was printed until then stays."""
    words, parts = _read_question(text, media)
    messages = question(words, _looked_at(parts, look), system)
    if schema is not None:
        _answer_by_schema(messages, sampling, who, schema, as_json, quiet)
        return
    found = find(who, DEFAULT_URL, quiet=quiet)
    deltas = found.model.stream(messages, sampling)
    if as_json:
        _print_json(found.told, collect(deltas))
    else:
        _print_stream(deltas, quiet)


def _answer_by_schema(
    messages: tuple[Message, ...], sampling: SamplingParams, who: Who, path: Path, as_json: bool, quiet: bool
) -> None:
    """The answer as JSON that keeps to the schema in a file, once it is complete and checked."""
    from qvl.tasks.keeping import Keeping
    from qvl.tasks.run import asking
    from qvl.tasks.schema import Schema

    keeping = Keeping(Schema.from_file(path))
    found = find(who, DEFAULT_URL, quiet=quiet)
    kept = keeping.ask(asking(found.model), messages, sampling)
    for note in () if quiet else kept.notes:
        print(f"qvl: {note}", file=sys.stderr)
    if as_json:
        _print_json(found.told, kept.completion, {"value": kept.value})
    else:
        print(json.dumps(kept.value, ensure_ascii=False, indent=2))


def _looked_at(parts: Sequence[MediaPart], look: Look) -> list[MediaPart]:
    """The parts with their limits. Raises `InvalidRequest` for a wish that no part can grant."""
    kinds = {part.kind for part in parts}
    if look.detail != "auto" and "image" not in kinds:
        raise InvalidRequest("--image-detail is for pictures, and there is none")
    if look.fps is not None and "video" not in kinds:
        raise InvalidRequest("--fps is for videos, and there is none")
    limits = {
        "image": PixelLimits(max_pixels=LOW_DETAIL_PIXELS if look.detail == "low" else None),
        "video": PixelLimits(fps=look.fps),
    }
    return [replace(part, limits=limits[part.kind]) for part in parts]


def _read_question(text: str, media: Sequence[str]) -> tuple[str, list[MediaPart]]:
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
    if (screen := screen_part(item)) is not None:
        return screen
    path = Path(os.path.expanduser(item))
    if path.is_dir():
        raise InvalidRequest(f"{item} is a folder: `qvl batch {item} --prompt TEXT -o FILE` asks about each picture")
    if not path.is_file():
        raise InvalidRequest(f"no such file: {item}")
    if path.suffix.lower() == ".pdf":
        raise InvalidRequest(f"{item} is a PDF document: `qvl ocr {item}` reads its pages, as all tasks do")
    return MediaPart(media_kind(path), path)


def _print_stream(deltas: Iterator[Delta], quiet: bool) -> None:
    ended = True
    for delta in deltas:
        if delta.text:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            ended = delta.text.endswith("\n")
        if delta.finish_reason == "length" and not quiet:
            print("\nqvl: the answer was cut at --max-tokens", file=sys.stderr)
    if not ended:
        print()


def _print_json(source: str, completion: Completion, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    usage = completion.usage
    print(
        json.dumps(
            {
                "text": completion.text,
                **more,
                "finish_reason": completion.answers[0].finish_reason,
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
                "cached_tokens": usage.cached_tokens,
                "answered_by": source,
            },
            ensure_ascii=False,
        )
    )
