"""`run` in a process of its own: the ready line, the way down, and starts that fail."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from qvl.backends.base import BackendInfo
from qvl.backends.echo import EchoBackend
from qvl.errors import ConfigError
from qvl.server.door import ready_line
from qvl.server.options import ServerOptions
from qvl.server.run import run
from tests.server.live import first_line, wait_until

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from pathlib import Path
from qvl.server.options import ServerOptions
from qvl.server.run import run
from tests.server.held import HeldEcho
sys.exit(run(ServerOptions(port=0, drain_seconds=float(sys.argv[1])), HeldEcho(Path(sys.argv[2]).exists)))
"""
TEXT = "x" * 200
LIMIT = 120  # seconds; a slow machine is no failure


class Process:
    def __init__(self, popen: subprocess.Popen[str], log: Path, gate: Path | None = None) -> None:
        self.popen = popen
        self._log = log
        self._gate = gate
        self.line = first_line(popen, log.read_text)
        found = re.search(r"http://[\d.:]+", self.line)
        assert found, self.line
        self.url = found.group()

    def release(self) -> None:
        """Let the answers go on."""
        assert self._gate is not None
        self._gate.touch()

    def ask(self, stream: bool, text: str = TEXT) -> requests.Response:
        """With `stream`, returns as soon as the answer has begun."""
        body = {"messages": [{"role": "user", "content": text}], "stream": stream}
        return requests.post(self.url + "/v1/chat/completions", json=body, stream=stream, timeout=LIMIT)

    def wait_in_flight(self, count: int) -> None:
        wait_until(lambda: self._in_flight() == count, lambda: f"they do not run: {self._log.read_text()}")

    def _in_flight(self) -> float:
        metrics = requests.get(self.url + "/metrics", timeout=LIMIT).text
        return float(re.findall(r"^qvl_requests_in_flight (.*)$", metrics, re.MULTILINE)[0])

    def wait_status(self, path: str, status: int) -> None:
        wait_until(lambda: self.status(path) == status, lambda: f"{path} is never {status}: {self._log.read_text()}")

    def status(self, path: str) -> int:
        try:
            return requests.get(self.url + path, timeout=LIMIT).status_code
        except requests.ConnectionError:
            return 0


@contextmanager
def process(folder: Path, drain_seconds: float) -> Iterator[Process]:
    log, gate = folder / "log", folder / "gate"
    command = [sys.executable, "-c", CODE, str(drain_seconds), str(gate)]
    with log.open("w") as file:
        popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        yield Process(popen, log, gate)
    finally:
        popen.kill()
        popen.communicate()
        print(log.read_text())  # shown when the test fails


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(tmp_path: Path, sign: signal.Signals) -> None:
    """What runs is finished, what comes is refused, and the exit code is 0."""
    with process(tmp_path, drain_seconds=600) as server, ThreadPoolExecutor(2) as pool:
        running: list[Future[requests.Response]] = [pool.submit(server.ask, stream) for stream in (False, True)]
        server.wait_in_flight(2)
        server.popen.send_signal(sign)
        server.wait_status("/ready", 503)
        assert server.status("/health") == 200
        refused = server.ask(stream=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        server.release()
        whole, streamed = (one.result() for one in running)
        assert whole.json()["choices"][0]["message"]["content"] == TEXT
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert server.popen.wait(LIMIT) == 0


def test_an_idle_server_ends_at_once(tmp_path: Path) -> None:
    with process(tmp_path, drain_seconds=600) as server:
        session = requests.Session()
        assert session.get(server.url + "/health", timeout=LIMIT).status_code == 200  # an idle connection stays open
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(LIMIT) == 0


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    with process(tmp_path, drain_seconds=600) as server, server.ask(stream=True):
        server.wait_in_flight(1)
        server.popen.send_signal(signal.SIGINT)
        server.wait_status("/ready", 503)
        server.popen.send_signal(signal.SIGINT)
        assert server.popen.wait(LIMIT) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_end_of_the_drain_time_is_the_end(tmp_path: Path) -> None:
    with process(tmp_path, drain_seconds=0.3) as server:
        running = server.ask(stream=True)
        server.popen.send_signal(signal.SIGTERM)
        assert server.popen.wait(LIMIT) == 0
        *_, error, done, end = running.text.split("\n\n")
        assert json.loads(error[6:])["error"]["message"] == "the server is shutting down"
        assert (done, end) == ("data: [DONE]", "")


def test_the_ready_line_says_everything() -> None:
    info = BackendInfo(("Qwen2-VL-7B",), 8192, 64, "cuda:0 H200", "bfloat16", kv_tokens=100_000, load_seconds=3.21)
    assert ready_line("http://127.0.0.1:8000", info, ("qwen",)) == (
        "qvl ready: http://127.0.0.1:8000  model qwen  device cuda:0 H200  dtype bfloat16  "
        "KV cache 100,000 tokens = 12.2 requests of 8,192 tokens  (3.2 s)"
    )


class NeverStarts(EchoBackend):
    stopped = False

    async def start(self) -> None:
        raise ConfigError("no such folder: models/x")

    async def stop(self) -> None:
        self.stopped = True


def test_a_start_that_fails_is_raised_and_everything_is_given_back() -> None:
    backend = NeverStarts()
    with pytest.raises(ConfigError, match="models/x"):
        run(ServerOptions(port=0), backend)
    assert backend.stopped


def test_an_address_in_use_is_told_by_name() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
            run(ServerOptions(port=port), EchoBackend())


@pytest.mark.parametrize(
    ("bad", "names"),
    [
        ({"port": 70_000}, "port"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"root_path": "prefix/"}, "root_path"),
        ({"log_level": "loud"}, "log_level"),
        ({"stall_seconds": 0}, "stall_seconds"),
    ],
)
def test_options_that_cannot_work(bad: dict[str, Any], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        ServerOptions(**bad)


def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    """The whole of `qvl serve` on a folder that is no checkpoint."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    command = [sys.executable, "-c", "from qvl.cli.app import main; main()", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "config.json" in done.stderr.splitlines()[-1]


WITH_FAKE_ENGINE = """
import sys
from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions
from qvl.server.options import ServerOptions
from qvl.server.run import run
engine = (sys.executable, "-m", "tests.engine.fake_engine", "fast")
options = EngineOptions(model=sys.argv[1], device="cpu", served_model_name="tiny")
run(ServerOptions(port=0), LocalBackend(options, command=engine))
"""
QVL = "from qvl.cli.app import main; main()"
FLAGS = (
    "--port",
    "0",
    "--device",
    "cpu",
    "--max_model_len",
    "512",
    "--num-threads",
    "1",
    "--served-model-name",
    "tiny",
)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_however_the_server_ends_its_engine_and_its_folders_end_too(
    checkpoint: Path, tmp_path: Path, sign: int
) -> None:
    """The command with the real engine, and a server that has no time to clean up."""
    if sign == signal.SIGTERM:
        arguments = [QVL, "serve", str(checkpoint), *FLAGS]
    else:
        arguments = [WITH_FAKE_ENGINE, str(checkpoint)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", *arguments]
    log = tmp_path / "log"
    with log.open("w") as file:
        popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True, env=environment)
    try:
        server = Process(popen, log)
        assert "model " in server.line
        assert server.ask(stream=False, text="Hello!").status_code == 200
        engines = [int(pid) for pid in children_of(popen.pid)]
        assert len(engines) == 1
        assert len(list(tmp_path.glob("qvl-run-*"))) >= 1
        popen.send_signal(sign)
        assert popen.wait(LIMIT) == (0 if sign == signal.SIGTERM else -sign)
        wait_until(lambda: not alive(engines[0]), "the engine process lives on")
        assert list(tmp_path.glob("qvl-run-*")) == []
    finally:
        popen.kill()
        popen.communicate()
        print(log.read_text())


def alive(pid: int) -> bool:
    """Whether the process runs (one that has ended, but that nobody has waited for, does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter between opening and reading
        return False


def children_of(pid: int) -> list[str]:
    """Of all its threads; read anew when one ends meanwhile, since its children are another thread's then."""
    tasks = Path(f"/proc/{pid}/task")
    while True:
        try:
            return [child for task in tasks.iterdir() for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            if not tasks.exists():
                raise


def test_the_engine_leaves_draining_to_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    """A supervisor such as systemd sends SIGTERM to every process of a service."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", WITH_FAKE_ENGINE, str(checkpoint)]
    with log.open("w") as file:
        popen = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        server = Process(popen, log)
        assert "model " in server.line
        engines = children_of(popen.pid)
        os.kill(int(engines[0]), signal.SIGTERM)
        assert server.ask(stream=False, text="Hello!").status_code == 200
        assert children_of(popen.pid) == engines
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(LIMIT) == 0
    finally:
        popen.kill()
        popen.communicate()
        print(log.read_text())
