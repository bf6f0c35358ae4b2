"""A small typed client for any OpenAI-compatible vision server, qvl's own first.

    with Client() as client:
        print(client.ask("Read the text.", "photo.jpg"))

Knows how a conversation goes over HTTP and comes back: pictures of this machine become data URLs, events become
`Delta`s, error bodies become the errors of `qvl.errors`. Does not know models, and imports no torch. What decides
anything (`body_of`, `EventReader`, `collect`) is free of sockets, so that another transport can share it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import mimetypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from qvl import wire
from qvl.engine.answers import Collector
from qvl.engine.messages import Dialogue, read_dialogue
from qvl.errors import InvalidRequest, QvlError, RequestFailed, Unavailable
from qvl.types import (
    DEFAULT_URL,
    ChatRequest,
    Completion,
    Delta,
    MediaKind,
    MediaPart,
    Message,
    Part,
    SamplingParams,
    TextPart,
)

CONNECT_SECONDS = 5.0

_VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
_MAGIC = ((b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"RIFF", "image/webp"))


class Client:
    """Asks one server. Close it, or use it as a context manager.

    `base_url`: the server's root, with or without "/v1"; None reads QVL_BASE_URL, else it is port 8000 of this machine.
    `model`: a name it serves; None asks the server once and takes the first. `api_key`: None reads QVL_API_KEY.
    `timeout`: seconds without a sign of life from the server. `transport` is for tests. All methods raise `QvlError`s:
    what the server answered, or `Unavailable` when nothing answers.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        given = base_url or os.environ.get("QVL_BASE_URL") or DEFAULT_URL
        self.base_url = given.rstrip("/").removesuffix("/v1").rstrip("/")
        self._model = model
        key = api_key or os.environ.get("QVL_API_KEY")
        self._http = httpx.Client(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            transport=transport,
            # A proxy of the environment is for the wide world; the server stands on this machine unless told otherwise.
            trust_env=not _is_local(self.base_url),
        )

    def chat(self, messages: Dialogue, sampling: SamplingParams | None = None) -> Completion:
        """The whole answer to a conversation: a text, or turns as `Message`s or OpenAI's dicts (`engine.messages`)."""
        return collect(self.stream(messages, sampling))

    def stream(self, messages: Dialogue, sampling: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer piece by piece. Leaving the loop early ends the work on the server too."""
        request = ChatRequest(read_dialogue(messages), sampling or SamplingParams())
        body = body_of(request, self.model)
        reader = EventReader()
        with _http_errors(self.base_url), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise _error(response)
            for piece in response.iter_bytes():
                for data in reader.feed(piece):
                    yield from wire.read_chunk(data)
        if not reader.done:
            raise RequestFailed("the server ended the stream before the answer was complete")

    def ask(self, text: str, *media: Any, system: str | None = None, sampling: SamplingParams | None = None) -> str:
        """The answer to one question about pictures or videos: URLs, paths, bytes, PIL pictures or `MediaPart`s."""
        return self.chat(question(text, media, system), sampling).text

    def models(self) -> list[str]:
        """The names that the server serves, its main one first."""
        data = self._get("/v1/models").json()
        return [model["id"] for model in data["data"]]

    def ready(self) -> bool:
        """Whether a chat request would be answered now. False too when nothing answers."""
        try:
            self._get("/ready")
        except QvlError:
            return False
        return True

    @property
    def model(self) -> str:
        """The model that is asked."""
        if self._model is None:
            names = self.models()
            if not names:
                raise Unavailable(f"the server at {self.base_url} serves no model")
            self._model = names[0]
        return self._model

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, path: str) -> httpx.Response:
        with _http_errors(self.base_url):
            response = self._http.get(path)
        if response.status_code != 200:
            raise _error(response)
        return response


class EventReader:
    """Server-sent events from bytes, however they were cut by the network. Feed pieces, get each event's JSON.

    Lines end at a line feed only: text that holds U+2028 or a vertical tab stays whole.
    """

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The events that `piece` completes. Raises `RequestFailed` for what is not an event stream of JSON objects."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events: list[dict[str, Any]] = []
        for line in lines:
            field, _, value = line.rstrip(b"\r").partition(b":")
            if field != b"data" or self.done:
                continue
            if value.strip() == b"[DONE]":
                self.done = True
                continue
            events.append(_json_object(value))
        return events


def body_of(request: ChatRequest, model: str) -> dict[str, Any]:
    """The JSON body of a streamed chat completion; pictures of this machine travel inside it."""
    messages = tuple(Message(m.role, tuple(map(_portable, m.parts))) for m in request.messages)
    body = wire.chat_body(dataclasses.replace(request, messages=messages), model, True)
    return {**body, "stream_options": {"include_usage": True}}


def collect(deltas: Iterable[Delta]) -> Completion:
    """All answers of a stream, joined; one that never ended has the finish_reason "abort"."""
    collector = Collector()
    for delta in deltas:
        collector.add(delta)
    return collector.completion()


def question(text: str, media: Sequence[Any], system: str | None = None) -> tuple[Message, ...]:
    """The conversation of one question: pictures first, then the text; `system` before it."""
    parts: tuple[Part, ...] = (*(_media_part(item) for item in media), TextPart(text))
    opening = (Message("system", (TextPart(system),)),) if system is not None else ()
    return (*opening, Message("user", parts))


def media_kind(source: Any) -> MediaKind:
    """What a file or address most likely holds, by its name; anything without a telling name counts as a picture."""
    if not isinstance(source, str | Path):
        return "image"
    text = str(source)
    if text.startswith("data:"):
        return "video" if text.startswith("data:video/") else "image"
    path = urlsplit(text).path if "://" in text else text
    return "video" if path.lower().endswith(_VIDEO_SUFFIXES) else "image"


def _media_part(item: Any) -> MediaPart:
    return item if isinstance(item, MediaPart) else MediaPart(media_kind(item), item)


def _portable(part: Part) -> Part:
    """The same part; a picture or video as URLs that mean the same on another machine."""
    if isinstance(part, TextPart):
        return part
    if part.kind == "video" and isinstance(part.source, list | tuple):
        return dataclasses.replace(part, source=tuple(_as_url(frame, "image") for frame in part.source))
    return dataclasses.replace(part, source=_as_url(part.source, part.kind))


def _as_url(source: Any, kind: MediaKind) -> str:
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        return source
    if isinstance(source, str | Path):
        return _file_as_url(Path(str(source).removeprefix("file://")).expanduser(), kind)
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        return _data_url(data, next((mime for magic, mime in _MAGIC if data.startswith(magic)), None), kind)
    return _pixels_as_url(source)


def _file_as_url(path: Path, kind: MediaKind) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from error
    return _data_url(data, mimetypes.guess_type(path.name)[0], kind)


def _pixels_as_url(source: Any) -> str:
    """A PIL picture or a uint8 array [h, w, 3] as PNG, which loses nothing."""
    from PIL import Image  # only programs that hold pictures in memory pay for it

    picture = source if isinstance(source, Image.Image) else Image.fromarray(source)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return _data_url(buffer.getvalue(), "image/png", "image")


def _data_url(data: bytes, mime: str | None, kind: MediaKind) -> str:
    known = mime is not None and (mime.startswith(f"{kind}/") or mime == "image/gif")
    return f"data:{mime if known else 'application/octet-stream'};base64,{base64.b64encode(data).decode()}"


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise RequestFailed("the server sent an event that is not JSON") from error
    if not isinstance(value, dict):
        raise RequestFailed("the server sent an event that is not a JSON object")
    return value


def _error(response: httpx.Response) -> QvlError:
    wait = response.headers.get("retry-after", "")
    return wire.read_error(response.status_code, response.content, int(wait) if wait.isdigit() else 1)


def _is_local(url: str) -> bool:
    return (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1")


@contextmanager
def _http_errors(base_url: str) -> Iterator[None]:
    """What httpx raises, in our words."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Unavailable(f"no server answers at {base_url}; `qvl serve` starts one") from error
    except httpx.TimeoutException as error:
        raise Unavailable(f"the server at {base_url} did not answer in time") from error
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"'{base_url}' is no address of a server: {error}") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the connection to {base_url} broke: {error}") from error
