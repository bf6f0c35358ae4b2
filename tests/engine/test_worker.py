"""The engine process from outside: frames over its socket, pixels through files, and every way it can end."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from qvl.backends.room import PIECE_BYTES, PixelRoom
from qvl.engine.options import EngineOptions
from qvl.engine.protocol import (
    AbortRequest,
    AddRequest,
    Drain,
    Failed,
    FrameBuffer,
    FromEngine,
    MediaInput,
    Outputs,
    PixelFile,
    Ready,
    ToEngine,
    TokenOutput,
    decode_from_engine,
    encode,
    frame,
)
from qvl.types import SamplingParams
from tests.engine.fake_engine import BAD, CRASH, END

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds; a slow machine is no failure


class Worker:
    """A worker process of the fake engine, and connections to it."""

    def __init__(self, folder: Path, mood: str, command: tuple[str, ...] = ("-m", "tests.engine.fake_engine")) -> None:
        self.path = str(folder / "s")
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self._log = folder / "log"
        setup = {"options": EngineOptions(model="fake"), "socket": self.path, "scratch": [str(self.scratch)]}
        self.process = subprocess.Popen(
            [sys.executable, *command, mood],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            stderr=self._log.open("w"),
        )
        assert self.process.stdin is not None
        self.process.stdin.write(msgspec.json.encode(setup) + b"\n")
        self.process.stdin.flush()

    def connect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT)
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            try:
                sock.connect(self.path)
                return Client(sock)
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, f"the worker ended before it listened: {self.log()}"
                time.sleep(0.01)
        raise AssertionError(f"the worker never listened: {self.log()}")

    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._frames, self._bodies = FrameBuffer(), list[bytes]()
        self._heard: list[TokenOutput] = []

    def send(self, message: ToEngine) -> None:
        self.sock.sendall(frame(encode(message)))

    def receive(self) -> FromEngine | None:
        """The next message; None at the end of the connection."""
        while not self._bodies:
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self._bodies += self._frames.feed(data)
        message = decode_from_engine(self._bodies.pop(0))
        if isinstance(message, Outputs):
            self._heard += message.outputs
        return message

    def outputs(self, request_id: str) -> list[TokenOutput]:
        """Everything about one request up to its end, heard before or from now on."""
        while not any(output.finish_reason for output in self._of(request_id)):
            assert isinstance(self.receive(), Outputs | Ready)
        return self._of(request_id)

    def _of(self, request_id: str) -> list[TokenOutput]:
        return [output for output in self._heard if output.request_id == request_id]

    def stats_until(self, aborted: int) -> Outputs:
        while True:
            message = self.receive()
            assert message is not None
            if isinstance(message, Outputs) and message.stats.aborted >= aborted:
                return message


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")


@pytest.fixture
def worker(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder, "fast")
    yield worker
    worker.end()


@pytest.fixture
def slow_worker(folder: Path) -> Iterator[Worker]:
    worker = Worker(folder, "slow")
    yield worker
    worker.end()


@pytest.fixture
def held_worker(folder: Path) -> Iterator[Worker]:
    """Says one token of each answer, and the rest after `release`."""
    worker = Worker(folder, f"held:{folder / 'gate'}")
    yield worker
    worker.end()


def release(folder: Path) -> None:
    (folder / "gate").touch()


def add(request_id: str, *tokens: int, media: tuple[MediaInput, ...] = ()) -> AddRequest:
    return AddRequest(request_id, list(tokens), list(media), SamplingParams(max_tokens=400))


def ids(outputs: list[TokenOutput]) -> list[int]:
    """The tokens, without the end token."""
    tokens = [token for output in outputs for token in output.token_ids]
    return tokens[:-1] if tokens[-1:] == [END] else tokens


def test_ready_then_tokens_then_the_end(worker: Worker) -> None:
    client = worker.connect()
    ready = client.receive()
    assert isinstance(ready, Ready)
    assert (ready.info.model, ready.info.kv_tokens, ready.config) == ("fake", 1024, '{"fake": true}')
    client.send(add("a", 5, 6, 7))
    outputs = client.outputs("a")
    assert ids(outputs) == [5, 6, 7]
    assert [output.finish_reason for output in outputs] == [None, None, None, "stop"]


def test_several_clients_hear_only_of_their_own(slow_worker: Worker) -> None:
    one, two = slow_worker.connect(), slow_worker.connect()
    one.send(add("one", *range(10)))
    two.send(add("two", *range(100, 110)))
    for client, name, start in ((one, "one", 0), (two, "two", 100)):
        seen: list[TokenOutput] = []
        while not seen or seen[-1].finish_reason is None:
            message = client.receive()
            if isinstance(message, Outputs):
                seen += message.outputs
        assert {output.request_id for output in seen} == {name}
        assert ids(seen) == list(range(start, start + 10))


def test_a_lost_connection_aborts_its_requests_only(held_worker: Worker, folder: Path) -> None:
    one, two = held_worker.connect(), held_worker.connect()
    two.send(add("two", *range(100, 140)))
    while not isinstance(two.receive(), Outputs):
        pass
    one.send(add("one", *range(40)))
    while not isinstance(one.receive(), Outputs):
        pass
    one.sock.close()
    assert two.stats_until(aborted=1).stats.running == 1
    release(folder)
    assert ids(two.outputs("two")) == list(range(100, 140))


def test_abort_ends_a_request_in_silence_and_only_for_its_owner(held_worker: Worker) -> None:
    one, two = held_worker.connect(), held_worker.connect()
    one.send(add("one", *range(300)))
    while not isinstance(one.receive(), Outputs):
        pass
    two.send(AbortRequest("one"))
    two.send(add("bad", BAD))
    two.outputs("bad")  # what was sent before it has been acted on
    one.send(AbortRequest("one"))
    stats = one.stats_until(aborted=1).stats
    assert (stats.running, stats.aborted) == (0, 1)


def test_an_id_in_use_and_a_refused_request_are_told_alone(held_worker: Worker, folder: Path) -> None:
    client = held_worker.connect()
    client.send(add("a", *range(30)))
    client.send(add("b", BAD))
    (refused,) = client.outputs("b")
    assert (refused.finish_reason, refused.error) == ("error", "a bad token")
    two = held_worker.connect()
    two.send(add("a", 1))
    (duplicate,) = two.outputs("a")
    assert duplicate.error == "a request of this id is already running"
    release(folder)
    assert client.outputs("a")[-1].finish_reason == "stop"


def test_pixels_come_through_files_that_are_gone_afterwards(worker: Worker) -> None:
    client = worker.connect()
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), dtype=np.uint8)
    path = worker.scratch / "p.rgb"
    path.write_bytes(pixels.tobytes())
    medium = MediaInput("image", 0, 1, 1, 2, 2, b"d" * 16, 28, 28, PixelFile(str(path), pixels.shape))
    client.send(add("a", 1, media=(medium,)))
    assert ids(client.outputs("a")) == [1, 97 + int(pixels.sum()) % 26]
    assert not path.exists()
    client.send(add("b", 1, media=(medium,)))
    (lost,) = client.outputs("b")
    assert lost.finish_reason == "error"
    assert str(path) not in (lost.error or ""), "paths are not for callers"


def test_pixels_come_through_shared_memory_too(worker: Worker) -> None:
    client, other = worker.connect(), worker.connect()
    room = PixelRoom(PIECE_BYTES)
    client.send(room.announcement)
    client.send(add("before", 1))
    client.outputs("before")
    pixels = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), dtype=np.uint8)
    for number in range(3):
        (place,) = room.hand_over(pixels)
        assert room.empty(pixels.shape) is None, "it has one piece"
        medium = MediaInput("image", 0, 1, 1, 2, 2, b"d" * 16, 28, 28, place)
        client.send(add(str(number), 1, media=(medium,)))
        assert ids(client.outputs(str(number))) == [1, 97 + int(pixels.sum()) % 26]
        end = time.monotonic() + LIMIT
        while room.empty(pixels.shape) is None:
            assert time.monotonic() < end, "the engine has done with it and does not say so"
            time.sleep(0.01)
    other.send(add("stranger", 1, media=(medium,)))
    (refused,) = other.outputs("stranger")
    assert refused.finish_reason == "error", "it is shared with the one who announced it"
    client.send(type(room.announcement)(str(worker.scratch / "none"), 5000))
    client.send(add("still", 1))
    assert ids(client.outputs("still")) == [1], "what cannot be shared is told in the log, and nothing else happens"
    assert "cannot be shared" in worker.log()


def test_options_that_cannot_work_are_told_to_whoever_waits(folder: Path) -> None:
    worker = Worker(folder, "refuses")
    assert worker.connect().receive() == Failed("this engine refuses to start")
    assert worker.process.wait(LIMIT) == 2


def test_a_bug_at_start_is_told_too(folder: Path) -> None:
    worker = Worker(folder, "breaks")
    assert worker.connect().receive() == Failed("the engine cannot start: ZeroDivisionError: a bug")
    assert worker.process.wait(LIMIT) == 1


def test_a_broken_step_ends_the_process_with_a_last_word(worker: Worker) -> None:
    client = worker.connect()
    client.send(add("a", 1, CRASH))
    messages = []
    while (message := client.receive()) is not None:
        messages.append(message)
    assert messages[-1] == Failed("the engine cannot go on: RuntimeError")
    assert worker.process.wait(LIMIT) == 1


def test_a_door_that_breaks_ends_the_process(folder: Path) -> None:
    """Askers notice an end; they would wait for ever for an engine that lives and does not hear them."""
    code = (
        "import sys; from qvl.engine.hub import Hub; Hub._accept = lambda self: 1 / 0;"
        "from qvl.engine.worker import main; from tests.engine.fake_engine import load; main(load)"
    )
    worker = Worker(folder, "fast", ("-c", code))
    client = worker.connect()
    assert worker.process.wait(LIMIT) == 1
    with contextlib.suppress(ConnectionResetError):  # the end of a connection that nobody has accepted
        assert client.receive() is None
    assert "ZeroDivisionError" in worker.log()


def test_drain_finishes_what_runs_and_takes_nothing_new(held_worker: Worker, folder: Path) -> None:
    client = held_worker.connect()
    client.send(add("a", *range(20)))
    client.send(Drain())
    client.send(add("late", 1))
    (late,) = client.outputs("late")
    assert late.error == "the engine is shutting down"
    release(folder)
    assert client.outputs("a")[-1].finish_reason == "stop"
    assert held_worker.process.wait(LIMIT) == 0


def test_garbage_closes_that_connection_and_nothing_else(worker: Worker) -> None:
    bad, good = worker.connect(), worker.connect()
    bad.sock.sendall(b"\xff\xff\xff\xff")
    while (message := bad.receive()) is not None:
        assert isinstance(message, Ready)
    good.send(add("a", 1))
    assert ids(good.outputs("a")) == [1]


def test_a_client_that_does_not_read_stops_nobody(worker: Worker) -> None:
    deaf, good = worker.connect(), worker.connect()
    deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    for number in range(20):
        deaf.send(add(f"deaf{number}", *range(400)))
    good.send(add("a", 1, 2, 3))
    assert ids(good.outputs("a")) == [1, 2, 3]
    assert len(deaf.outputs("deaf19")) == 400, "what it did not read in time is not lost"


def test_the_worker_dies_with_its_parent_and_cleans_up(folder: Path) -> None:
    """A parent killed by SIGKILL says nothing; the end of the pipe does."""
    code = (
        "import sys, time; from pathlib import Path; from tests.engine.test_worker import Worker;"
        "w = Worker(Path(sys.argv[1]), 'slow'); w.connect(); print(w.process.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + LIMIT
    while (_alive(pid) or (folder / "scratch").exists()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not _alive(pid)
    assert not (folder / "scratch").exists()


def _alive(pid: int) -> bool:
    """Whether the process runs (one that has ended but was not waited for does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
