"""What a server's start decides before anything is loaded."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.errors import ConfigError
from qvl.server.start import process_count

ROOT = Path(__file__).resolve().parents[2]


def test_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert process_count("auto", "cpu") == 1
    assert process_count("auto", "cuda") == 4
    assert process_count("auto", "cuda:1") == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert process_count("auto", "cuda") == 1
    assert process_count("7", "cpu") == 7
    with pytest.raises(ConfigError, match="api-server-count"):
        process_count("several", "cpu")


def test_the_engine_is_started_before_what_takes_long_to_import() -> None:
    code = "import sys, qvl.server.start; print([m for m in %r if m in sys.modules])"
    heavy = ["numpy", "uvicorn", "fastapi", "pydantic", "httpx", "tokenizers", "jinja2", "torch"]
    done = subprocess.run([sys.executable, "-c", code % heavy], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_an_address_in_use_leaves_no_engine_behind(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "qvl", "serve", str(checkpoint), "--device", "cpu", "--port", port]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert list(tmp_path.glob("qvl-run-*")) == []


EARLY = """
import os, signal, sys
class Signalling:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[3]:
            os.kill(os.getpid(), int(sys.argv[4]))
sys.meta_path.insert(0, Signalling())
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever this runs
from qvl.engine.options import EngineOptions
from qvl.server.options import ServerOptions
from qvl.server.start import start
engine = (sys.executable, "-m", "tests.engine.fake_engine", "fast")
sys.exit(start(ServerOptions(port=0), EngineOptions(model=sys.argv[1], device="cpu"), int(sys.argv[2]), engine))
"""


@pytest.mark.parametrize(
    ("count", "module", "sign"),
    [
        (1, "qvl.server.app", signal.SIGINT),
        (1, "qvl.backends.local", signal.SIGTERM),
        (2, "qvl.server.supervisor", signal.SIGINT),
    ],
)
def test_a_signal_while_modules_load_is_not_lost(
    checkpoint: Path, tmp_path: Path, count: int, module: str, sign: signal.Signals
) -> None:
    """Nor told as a traceback: the server ends as it always does, and gives its folders back."""
    command = [sys.executable, "-c", EARLY, str(checkpoint), str(count), module, str(int(sign))]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("qvl-run-*")) == []
