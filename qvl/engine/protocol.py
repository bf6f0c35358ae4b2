"""The words between the engine process and those who ask it, and the frames that carry them over a unix stream socket.

One frame is a 4-byte big-endian length and a msgpack body; nothing is ever pickled. Pixels do not travel in frames: a
`PixelFile` names a file that the engine maps and then unlinks, or a place in memory that an asker shares with it:

    | 1: the engine is there, 1 for each ticket that it has | 1 for each ticket whose pixels have come | pixels ...

Knows the shape of every message. Does not know sockets' lifetimes, the scheduler, or torch.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import msgspec

from qvl.errors import QvlError
from qvl.types import FinishReason, Grid, MediaKind, SamplingParams, TokenLogprob

MAX_FRAME_BYTES = 64 * 1024 * 1024
NUM_TICKETS = 4096  # from 1 on
ROOM_HEAD = 2 * NUM_TICKETS  # bytes in front of the pixels of a `UseRoom`
OWN_FILE = -1
GRAMMARS_READY = b"ready\n"  # the first line that `qvl.engine.grammar_worker` says
_LENGTH = struct.Struct(">I")


class ProtocolError(QvlError):
    """A frame that is too long, cut short, or not one of our messages: the connection is of no further use."""

    code = "engine_protocol"


class PixelFile(msgspec.Struct, frozen=True, array_like=True):
    """Raw uint8 pixels in a file that both processes can map: `shape` is [frames, h, w, 3], C order.

    They fill the file, or they begin at byte `offset` of a `UseRoom`. The byte of `ticket` is 1 there, and becomes 0
    when the engine has done with them. Once they have come they do not change until then.
    """

    path: str
    shape: tuple[int, int, int, int]
    offset: int = 0
    ticket: int = OWN_FILE


class MediaInput(msgspec.Struct, frozen=True, array_like=True):
    """One picture or video of a prompt: tokens [offset, offset + length) are its pads, `t` x `h` x `w` its patches.

    `height` and `width` are the pixels it is resized to (multiples of the patch factor); `pixels` is None where they
    are handed over in process.
    """

    kind: MediaKind
    offset: int
    length: int
    t: int
    h: int
    w: int
    digest: bytes
    height: int
    width: int
    pixels: PixelFile | None = None

    @property
    def grid(self) -> Grid:
        return Grid(self.t, self.h, self.w)


class AddRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Serve this prompt. Resolved `sampling`, None only in `logprobs`, `seed`, `constraint`. Its `n` is ignored."""

    request_id: str
    token_ids: list[int]
    media: list[MediaInput]
    sampling: SamplingParams
    salt: bytes = b""


class AbortRequest(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Forget this request; nothing more is said about it. An unknown id is not an error (it may just have ended)."""

    request_id: str


class UseRoom(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Pixels will lie in this file too, which the engine maps; shared as long as the connection lasts."""

    path: str
    num_bytes: int


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Finish what runs and waits, take nothing new, then exit."""


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one request gained in one step. The last one carries `finish_reason`; with "error", `error` says why.

    `logprobs` has one entry per token of `token_ids`, or is None. `stop_reason` is the id out of `stop_token_ids`
    that ended the answer. The token that ended it, the checkpoint's end token too, is the last of `token_ids`.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, array_like=True):
    """The engine after a step: gauges first, then counters since it started."""

    running: int = 0
    waiting: int = 0
    kv_used_fraction: float = 0.0
    encoder_cache_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    encoder_queries: int = 0
    encoder_hits: int = 0
    encoded_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    encode_seconds: float = 0.0


class EngineInfo(msgspec.Struct, frozen=True, array_like=True):
    """What is served and how, said once when the engine is ready. `attention` names the path and why it was chosen."""

    model: str
    device: str
    dtype: str
    attention: str
    num_blocks: int
    block_size: int
    max_model_len: int
    load_seconds: float
    weight_bytes: int = 0
    kv_cache_bytes: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_blocks * self.block_size


class Outputs(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What a step produced for the receiver of this message."""

    outputs: list[TokenOutput]
    stats: EngineStats


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine takes requests. `config` is the final `EngineConfig` as JSON, with every measured number filled in."""

    info: EngineInfo
    config: str


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine could not start, or cannot go on; `message` is for the operator."""

    message: str


ToEngine: TypeAlias = AddRequest | AbortRequest | UseRoom | Drain
FromEngine: TypeAlias = Outputs | Ready | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The body of a frame. Raises `ProtocolError` when it would be above MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is above the cap of {MAX_FRAME_BYTES}")
    return body


def decode_to_engine(body: bytes) -> ToEngine:
    """The message in a frame for an engine. Raises `ProtocolError`, `InvalidRequest` for bad sampling values."""
    try:
        message: ToEngine = _to_engine.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a message for an engine: {error}") from error
    return message


def decode_from_engine(body: bytes) -> FromEngine:
    """The message in a frame that an engine sent. Raises `ProtocolError`."""
    try:
        message: FromEngine = _from_engine.decode(body)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a message from an engine: {error}") from error
    return message


def frame(body: bytes) -> bytes:
    """`body` with its length in front."""
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames, however the socket split it: for a reader that polls and must not block."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._data = bytearray()
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that `data` completes, in order. Raises `ProtocolError` on an announced length above the cap."""
        self._data += data
        bodies: list[bytes] = []
        start = 0
        while len(self._data) - start >= _LENGTH.size:
            length = _checked_length(self._data[start : start + _LENGTH.size], self._max_bytes)
            end = start + _LENGTH.size + length
            if end > len(self._data):
                break
            bodies.append(bytes(self._data[start + _LENGTH.size : end]))
            start = end
        del self._data[:start]
        return bodies


def _checked_length(head: bytes | bytearray, max_bytes: int) -> int:
    length: int = _LENGTH.unpack(head)[0]
    if length > max_bytes:
        raise ProtocolError(f"a frame of {length} bytes is above the cap of {max_bytes}")
    return length
