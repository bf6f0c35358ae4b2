"""Several HTTP processes around one engine: one address, sums that add up, and every way one of them can end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import requests

from qvl.server.counts import Counts, open_table, table_bytes
from tests.server import shapes
from tests.server.live import first_line, wait_until
from tests.server.test_run import alive, children_of

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
COUNT = 2
MANY = 16  # connections: so many that each of the processes gets some
LIMIT = 120  # seconds; a slow machine is no failure
CODE = """
import json, sys
from qvl.engine.options import EngineOptions
from qvl.errors import QvlError
from qvl.server.options import ServerOptions
from qvl.server.start import start
engine = (sys.executable, "-m", "tests.engine.fake_engine", sys.argv[2])
options = EngineOptions(model=sys.argv[1], device="cpu", max_model_len=512)
try:
    sys.exit(start(ServerOptions(**{"port": 0, **json.loads(sys.argv[4])}), options, int(sys.argv[3]), engine))
except QvlError as error:
    sys.exit(f"refused: {error.message}")
"""


class Server:
    """The supervisor; `http` and `engine` are its children's process ids, `log` is what all of them wrote."""

    def __init__(self, popen: subprocess.Popen[str], log: Path, gate: Path) -> None:
        self.popen = popen
        self._log = log
        self._gate = gate
        self._last: dict[str, tuple[int, str]] = {}
        line = first_line(popen, self.story)
        found = re.search(r"http://[\d.:]+", line)
        assert found, f"{line}; {self.story()}"
        self.url = found.group()

    def release(self) -> None:
        """Let an engine of mood "held" go on with its answers."""
        self._gate.touch()

    def children(self, module: str) -> list[int]:
        return [int(pid) for pid in children_of(self.popen.pid) if module in _command(int(pid))]

    @property
    def http(self) -> list[int]:
        return self.children("qvl.server.http_process")

    @property
    def engine(self) -> list[int]:
        return self.children("tests.engine.fake_engine\0")

    def ask(self, text: str = "hello", **more: Any) -> requests.Response:
        """Over a connection of its own, which any of the processes may get."""
        body = {"messages": [{"role": "user", "content": text}], **more}
        return requests.post(self.url + CHAT, json=body, timeout=LIMIT)

    def status(self, path: str) -> int:
        """0 where a connection broke: its process was being killed."""
        try:
            reply = requests.get(self.url + path, timeout=LIMIT)
            self._last[path] = reply.status_code, reply.text
        except requests.ConnectionError as error:
            self._last[path] = 0, str(error)
        return self._last[path][0]

    def every(self, path: str, status: int, times: int = 24) -> bool:
        """Whether all of so many new connections are answered so: none of the processes may say anything else."""
        return all(self.status(path) == status for _ in range(times))

    def metric(self, name: str) -> float:
        for line in requests.get(self.url + "/metrics", timeout=LIMIT).text.splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def wait(self, condition: Callable[[], bool], message: str) -> None:
        wait_until(condition, lambda: f"{message}; {self.story()}")

    def wait_metric(self, name: str, value: float) -> None:
        self.wait(lambda: self.metric(name) == value, f"{name} never became {value}")

    def story(self) -> str:
        """All that may explain why something did not come to pass."""
        exit_code = self.popen.poll()
        alive = exit_code if exit_code is not None else f"HTTP {self.http}, engine {self.engine}"
        return f"last replies {self._last}; processes or exit code: {alive}; the log:\n{self._log.read_text()[-8000:]}"


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter between opening and reading
        return ""


def launch(
    checkpoint: Path, folder: Path, mood: str, options: str = "{}", log: IO[str] | int = subprocess.PIPE
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(checkpoint), mood, str(COUNT), options]
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


@contextmanager
def running(checkpoint: Path, folder: Path, mood: str = "fast", options: str = "{}") -> Iterator[Server]:
    """`mood` is the engine's; a "held" one waits for `Server.release`."""
    log, gate = folder / "log", folder / "gate"
    with log.open("w") as file:
        popen = launch(checkpoint, folder, f"held:{gate}" if mood == "held" else mood, options, file)
    try:
        yield Server(popen, log, gate)
    finally:
        popen.kill()
        popen.communicate()
        print(log.read_text()[-8000:])  # shown when the test fails


Start = Callable[..., Any]


@pytest.fixture
def start(checkpoint: Path, tmp_path: Path) -> Start:
    return lambda mood="fast", options="{}": running(checkpoint, tmp_path, mood, options)


def test_they_share_an_address_an_engine_and_their_numbers(start: Start) -> None:
    with start() as server, ThreadPoolExecutor(8) as pool:
        assert (len(server.http), len(server.engine)) == (COUNT, 1)
        assert server.every("/ready", 200)
        replies = list(pool.map(lambda n: server.ask(f"number {n}"), range(40)))
        assert all(f"number {n}" in reply.json()["choices"][0]["message"]["content"] for n, reply in enumerate(replies))
        assert len({reply.json()["id"] for reply in replies}) == 40
        usage = Counter[str]()
        for reply in replies:
            usage.update({k: v for k, v in reply.json()["usage"].items() if isinstance(v, int)})
        # Whichever process is asked: the same sums.
        for _ in range(12):
            assert server.metric("qvl_prompt_tokens_total") == usage["prompt_tokens"]
            assert server.metric("qvl_generation_tokens_total") == usage["completion_tokens"]
            assert server.metric(f'qvl_http_requests_total{{method="POST",route="{CHAT}",status="200"}}') == 40
            assert server.metric("qvl_request_seconds_count") == 40
            assert server.metric("qvl_requests_in_flight") == 0
        assert served_by_each(server) == COUNT


def served_by_each(server: Server) -> int:
    """How many processes have kept count of a request: each has files of its own."""
    folder = metrics_folder(server)
    return sum(len(file.read_bytes().strip(b"\0")) > 100 for file in folder.glob("counter_*.db"))


def metrics_folder(server: Server) -> Path:
    environment = Path(f"/proc/{server.http[0]}/environ").read_text().split("\0")
    return Path(dict(line.split("=", 1) for line in environment if line)["PROMETHEUS_MULTIPROC_DIR"])


def test_pictures_go_through_folders_of_their_own(start: Start) -> None:
    with start() as server, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: requests.post(server.url + CHAT, json=shapes.two_pictures()), range(16)))
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.json()["choices"][0]["message"]["content"] for reply in replies}) == 1
        assert list(metrics_folder(server).parent.rglob("*.rgb*")) == []


def test_the_queue_is_one_for_all(start: Start) -> None:
    """8 answers are computed at once and 2 may wait, whichever process they come to."""
    with start("held", '{"max_queue": 2}') as server, ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(server.ask) for _ in range(10)]
        server.wait_metric("qvl_requests_in_flight", 10)
        refused = [server.ask("one more") for _ in range(12)]
        assert {reply.status_code for reply in refused} == {429}
        server.release()
        assert {one.result().status_code for one in asked} == {200}
        server.wait_metric("qvl_requests_in_flight", 0)
        assert server.ask("there is room again").status_code == 200


def test_a_killed_http_process_is_replaced(start: Start) -> None:
    with start("fast") as server:
        victim, other = server.http
        assert server.ask().status_code == 200
        before = server.metric("qvl_generation_tokens_total")
        os.kill(victim, signal.SIGKILL)
        server.wait(lambda: len(server.http) == COUNT and victim not in server.http, "it is not replaced")
        assert other in server.http
        server.wait(lambda: server.every("/ready", 200), "the new one never became ready")
        assert server.metric("qvl_generation_tokens_total") == before, "what the dead one had counted is kept"
        assert server.metric("qvl_requests_in_flight") == 0
        assert server.ask().status_code == 200


def test_requests_of_a_killed_http_process_are_forgotten(start: Start) -> None:
    with start("held") as server, ThreadPoolExecutor(MANY) as pool:
        for _ in range(MANY):
            pool.submit(_ask_and_forget, server)
        server.wait_metric("qvl_engine_running", MANY)
        for pid in server.http:
            os.kill(pid, signal.SIGKILL)
        server.wait(lambda: server.every("/ready", 200), "they are not replaced")
        server.wait_metric("qvl_engine_running", 0)
        server.wait_metric("qvl_requests_in_flight", 0)


def _ask_and_forget(server: Server) -> None:
    with pytest.raises(requests.RequestException):
        server.ask()


def test_a_killed_engine_is_told_by_all_and_replaced(start: Start) -> None:
    with start("held") as server, ThreadPoolExecutor(MANY) as pool:
        asked = [pool.submit(server.ask) for _ in range(MANY)]
        server.wait_metric("qvl_engine_running", MANY)
        old = server.engine
        os.kill(old[0], signal.SIGKILL)
        assert {one.result().status_code for one in asked} == {503}
        assert server.every("/health", 200, 8)
        server.wait(lambda: server.every("/ready", 200), "not ready again")
        assert server.engine not in ([], old)
        server.release()
        assert server.ask().status_code == 200
        assert all(server.metric("qvl_engine_restarts_total") == 1 for _ in range(8))


def test_an_engine_killed_while_it_starts_is_replaced_too(start: Start) -> None:
    """Its socket may be there already, and the HTTP processes at its door."""
    with start() as server:
        killed: set[int] = set()
        for pause in (0.0, 0.2, 0.4):
            server.wait(lambda: bool(set(server.engine) - killed), "no new one is started")
            (victim,) = set(server.engine) - killed
            time.sleep(pause)  # into its start, or its life: either will do
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
        server.wait(lambda: bool(set(server.engine) - killed) and server.every("/ready", 200), "not ready again")
        assert server.ask().status_code == 200


def test_a_signal_drains_all(start: Start) -> None:
    with start("held", '{"drain_seconds": 600}') as server, ThreadPoolExecutor(MANY) as pool:
        asked = [pool.submit(server.ask) for _ in range(MANY)]
        server.wait_metric("qvl_engine_running", MANY)
        server.popen.send_signal(signal.SIGTERM)
        server.wait(lambda: server.every("/ready", 503, 8), "still ready")
        assert server.ask("late").status_code == 503
        server.release()
        assert {one.result().status_code for one in asked} == {200}
        assert server.popen.wait(LIMIT) == 0


def test_a_second_signal_does_not_wait(start: Start) -> None:
    with start("held", '{"drain_seconds": 600}') as server, ThreadPoolExecutor(MANY) as pool:
        for _ in range(MANY):
            pool.submit(_ask_and_forget, server)
        server.wait_metric("qvl_engine_running", MANY)
        server.popen.send_signal(signal.SIGINT)
        server.wait(lambda: server.every("/ready", 503, 8), "still ready")
        server.popen.send_signal(signal.SIGINT)
        assert server.popen.wait(LIMIT) == 0


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_supervisor(start: Start, tmp_path: Path, sign: int) -> None:
    with start() as server:
        everybody = [*server.http, *server.engine]
        assert server.ask().status_code == 200
        memory = metrics_folder(server).parent
        server.popen.send_signal(sign)
        assert server.popen.wait(LIMIT) == (0 if sign == signal.SIGTERM else -sign)
        server.wait(lambda: not any(alive(pid) for pid in everybody), "a process lives on")
        assert list(tmp_path.glob("qvl-run-*")) == []
        assert not memory.exists()


@pytest.mark.parametrize(
    ("mood", "says"), [("refuses", "this engine refuses to start"), ("breaks", "ZeroDivisionError")]
)
def test_an_engine_that_cannot_start_ends_the_server(checkpoint: Path, tmp_path: Path, mood: str, says: str) -> None:
    popen = launch(checkpoint, tmp_path, mood)
    out, err = popen.communicate(timeout=LIMIT)
    assert (popen.returncode, out) == (1, "")
    assert err.splitlines()[-1].startswith("refused: ") and says in err.splitlines()[-1]


def test_http_processes_that_cannot_start_end_the_server(tmp_path: Path) -> None:
    """The folder has no tokenizer: each HTTP process says so."""
    popen = launch(tmp_path, tmp_path, "fast")
    out, err = popen.communicate(timeout=LIMIT)
    assert (popen.returncode, out) == (1, "")
    assert "refused: " in err and "config.json" in err.splitlines()[-1]


def test_a_taken_address_is_told_whoever_has_it(start: Start, checkpoint: Path, tmp_path: Path) -> None:
    """A second server at the same address would silently get a share of the first one's connections."""
    with start() as server:
        port = server.url.rsplit(":", 1)[1]
        second = launch(checkpoint, tmp_path, "fast", f'{{"port": {port}}}')
        assert f"cannot listen on 127.0.0.1:{port}" in second.communicate(timeout=LIMIT)[1]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        third = launch(checkpoint, tmp_path, "fast", f'{{"port": {taken.getsockname()[1]}}}')
        assert "cannot listen on" in third.communicate(timeout=LIMIT)[1]


def test_the_table_adds_up(tmp_path: Path) -> None:
    file = tmp_path / "table"
    file.write_bytes(bytes(table_bytes(3)))
    rows = [Counts(open_table(file), row) for row in range(3)]
    for number, row in enumerate(rows, 1):
        row.running += number
        row.held_bytes += 10 * number
    assert [row.all_running for row in rows] == [6] * 3
    assert [row.all_held_bytes for row in rows] == [60] * 3
    rows[0].engine_restarts = 5
    rows[1].clear()
    assert [(row.all_running, row.all_held_bytes, row.engine_restarts) for row in rows] == [(4, 40, 5)] * 3
    assert (Counts().all_running, rows[0].running) == (0, 1)
