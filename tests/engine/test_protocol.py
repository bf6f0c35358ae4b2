"""Messages survive the round trip, frames survive any cut, and nothing over-long is read."""

from __future__ import annotations

import random
import struct

import pytest

from qvl.engine import protocol
from qvl.engine.protocol import (
    AbortRequest,
    AddRequest,
    Drain,
    EngineInfo,
    EngineStats,
    Failed,
    FrameBuffer,
    MediaInput,
    Outputs,
    PixelFile,
    ProtocolError,
    Ready,
    TokenOutput,
)
from qvl.errors import InvalidRequest
from qvl.types import Grid, SamplingParams, TokenLogprob

SAMPLING = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    stop=("é", "END"),
    stop_token_ids=(3, 4),
    logit_bias={7: -1.5, 8: 100.0},
    seed=-(2**63),
    logprobs=2,
)
PIXELS = PixelFile("/dev/shm/x", (2, 3, 4, 3))
ADD = AddRequest("r", [1, 2], [MediaInput("video", 0, 2, 1, 2, 4, b"\x00\xff" * 8, 28, 56, PIXELS)], SAMPLING, b"s")
INFO = EngineInfo("m", "cpu", "float32", "sdpa", 10, 16, 100, 1.5)
LOGPROB = TokenLogprob(5, -0.25, ((5, -0.25), (6, -2.0)))
FROM = [
    Outputs(
        [TokenOutput("r", [5], [LOGPROB], "stop", 5, 16), TokenOutput("q", [], error="bad")], EngineStats(running=2)
    ),
    Ready(INFO, "{}"),
    Failed("no memory"),
]


@pytest.mark.parametrize("message", [ADD, AbortRequest("r"), Drain()], ids=lambda m: type(m).__name__)
def test_what_goes_to_the_engine_arrives(message: protocol.ToEngine) -> None:
    assert protocol.decode_to_engine(protocol.encode(message)) == message


@pytest.mark.parametrize("message", FROM, ids=lambda m: type(m).__name__)
def test_what_the_engine_says_arrives(message: protocol.FromEngine) -> None:
    assert protocol.decode_from_engine(protocol.encode(message)) == message


def test_types_are_kept_not_only_values() -> None:
    arrived = protocol.decode_to_engine(protocol.encode(ADD))
    assert isinstance(arrived, AddRequest)
    assert isinstance(arrived.sampling.stop, tuple)
    assert {type(key) for key in arrived.sampling.logit_bias} == {int}
    assert arrived.media[0].grid == Grid(1, 2, 4)
    assert isinstance(arrived.media[0].pixels, PixelFile)


def test_bad_values_are_refused_on_arrival() -> None:
    body = protocol.encode(AddRequest("r", [1], [], SamplingParams(max_tokens=5)))
    with pytest.raises(InvalidRequest, match="max_tokens"):
        protocol.decode_to_engine(body.replace(b"\xaamax_tokens\x05", b"\xaamax_tokens\x00"))
    for junk in (b"", b"\xc1", b"\x93", protocol.encode(Failed("x")), body[:-1]):
        with pytest.raises(ProtocolError):
            protocol.decode_to_engine(junk)
    with pytest.raises(ProtocolError):
        protocol.decode_from_engine(body)


def test_a_message_above_the_cap_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ProtocolError, match="above the cap"):
        protocol.encode(Failed("x" * 100))


@pytest.mark.parametrize("seed", range(5))
def test_the_buffer_finds_frames_however_they_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    bodies = [rng.randbytes(rng.choice([0, 1, 5, 300])) for _ in range(20)]
    stream = b"".join(protocol.frame(body) for body in bodies)
    buffer, found = FrameBuffer(), []
    while stream:
        cut = rng.randint(1, 40)
        found += buffer.feed(stream[:cut])
        stream = stream[cut:]
        assert found == bodies[: len(found)]
    assert found == bodies


def test_the_buffer_refuses_an_announced_length_above_the_cap() -> None:
    with pytest.raises(ProtocolError, match="above the cap of 10"):
        FrameBuffer(max_bytes=10).feed(struct.pack(">I", 11))
