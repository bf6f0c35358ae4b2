"""The command as a whole: spellings, suggestions, exit codes, and what a mistake looks like."""

from __future__ import annotations

import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from qvl import __version__
from qvl.cli.app import run
from qvl.cli.version import installed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--max-modle-len", "5"], "did you mean '--max-model-len'?"),
        (["serve", "--max_modle_len=5"], "did you mean '--max-model-len'?"),
        (["serve", "--model", "x"], "the model is the first argument"),
        (["serve", "--swap_space", "4"], "there is no --swap-space here: sequences that give way"),
        (["serv"], "did you mean 'serve'?"),
        (["OCR"], "did you mean 'ocr'?"),
        (["pull", "Qwen/Qwen2-VL-7B-Instruct"], "hf download"),
        (["run", "demo"], "qvl chat"),
        (["list"], "there is no command 'list'"),
        (["serve", "--port", "http"], "'--port'"),
        (["serve", "--port", "99999"], "'port' must be from 0"),
        (["serve", "--dtype", "fp8"], "'dtype' must be one of"),
        (["serve", "--tensor-parallel-size", "2"], "'tensor_parallel_size' is 2"),
        (["serve", "--pipeline_parallel_size=4"], "'pipeline_parallel_size' is 4"),
        (["serve", "--limit-mm-per-prompt", "imgae=4"], "did you mean 'image'?"),
        (["serve", "--limit-mm-per-prompt", "image=many"], "whole number"),
        (["serve", "--mm-processor-kwargs", '{"max_pixel": 3}'], "did you mean 'max_pixels'?"),
        (["serve", "--mm-processor-kwargs", "{"], "not valid JSON"),
        (["serve", "--kv-cache-memory", "lots"], "size like 2GiB"),
        (["serve", "--api-key", "line\nbreak"], "--api-key"),
        (["serve", "/no/such/folder"], "no checkpoint folder"),
        (["check", "/no/such/folder"], "no checkpoint folder"),
        (["ask"], "Missing argument 'TEXT'"),
        (["ask", "What?", "no-such.png"], "no such file: no-such.png"),
        (["ask", __file__], "the question comes before it"),
        (["bench", "engine", "--against", "magic"], "'magic'"),
        (["bench", "engine", "--picture", "huge"], "--picture"),
        (["bench", "shape", "3b", "x"], "known: 2b, 7b, 72b"),
        (["bench", "foo"], "no command 'foo' in qvl bench: there are serve, beside, kernels, shape, engine"),
        (["bench", "pull"], "there are serve"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(arguments)
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert says in err
    assert err.startswith("qvl: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "no-such-model"], "~/models"),
        (["check", "Qwen/Qwen2-VL-7B-Instruct"], "hf download Qwen/Qwen2-VL-7B-Instruct"),
        (["ask", "What?", "~nobody-of-that-name/a.png"], "no such file: ~nobody"),
        (["chat"], "QVL_HOME"),
    ],
)
def test_a_user_without_a_home(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container that runs under a number without a name."""

    def nameless(uid: int) -> NoReturn:
        raise KeyError(uid)

    for name in ("HOME", "QVL_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_CACHE", "QVL_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nameless)
    assert run(arguments) == 2
    assert says in capsys.readouterr().err


def test_version_names_what_decides_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["version"]) == 0
    assert re.fullmatch(r"qvl \S+, Python \S+, torch \S+, tokenizers \S+\n", capsys.readouterr().out)
    assert run(["--version"]) == run(["-V"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("qvl ")
    assert installed("no-such-package") == "missing"


def test_one_version_everywhere() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_without_arguments_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("serve", "ask", "check", "bench", "version"))
    assert run(["bench"]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("serve", "beside", "kernels", "shape", "engine"))


def test_a_terminal_without_utf_8() -> None:
    """What cannot be shown is a question mark; a text that cannot be understood is a mistake, told in one line."""
    server = "from qvl.backends.echo import EchoBackend; from tests.server.live import live\n"
    code = f"""{server}
import sys
from qvl.cli.app import main
with live(EchoBackend("parrot")) as running:
    sys.argv[1:] = ["ask", *sys.argv[1:], "--base-url", running.url]
    main()
"""

    def said(text: bytes, encoding: str) -> subprocess.CompletedProcess[bytes]:
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
        command = [sys.executable.encode(), b"-c", code.encode(), text]
        return subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False
        )

    assert said("苹果 ok".encode(), "ascii").stdout == b"?? ok\n"
    assert said("苹果".encode(), "gbk").stdout == "苹果\n".encode("gbk")
    wrong = said("苹果".encode("gbk"), "utf-8")
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert wrong.stderr.startswith(b"qvl: a text on the command line")


@pytest.mark.parametrize(
    ("shell", "code"),
    [("version <&-", 0), ("version >&-", 0), ("version 2>&-", 0), ("version >/dev/full", 1), ("--help >/dev/full", 1)],
)
def test_closed_and_full_streams(shell: str, code: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m qvl {shell}'], cwd=ROOT, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert (done.stderr == b"qvl: No space left on device\n") == (code == 1)


@pytest.mark.parametrize(
    ("typed", "offered"), [("qvl ser", "serve"), ("qvl serve --max-num-s", "--max-num-seqs"), ("qvl bench sh", "shape")]
)
def test_a_shell_completes_commands_and_flags(typed: str, offered: str) -> None:
    """What the script of `qvl --show-completion` runs when Tab is pressed."""
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_QVL_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-m", "qvl"], cwd=ROOT, env={**os.environ, **words}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.split() == [offered]


def test_a_reader_that_leaves_is_no_error() -> None:
    """`qvl --help | head -1`: no traceback, and the shell sees success."""
    code = "import sys; from qvl.cli.app import run; sys.exit(run(['--help'] ))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=300)
    assert b"Traceback" not in err


def test_a_shell_hears_nothing_of_a_command_that_there_is_not() -> None:
    words = {"COMP_WORDS": "qvl pull x", "COMP_CWORD": "2", "_QVL_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "qvl"]
    done = subprocess.run(command, env=os.environ | words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_the_command_starts_light() -> None:
    """Half of a second start is imports: what only some commands need loads with those."""
    code = "import sys, qvl.cli.app; sys.exit(bool({'torch', 'fastapi', 'httpx', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_ctrl_c_while_the_command_loads_is_no_traceback() -> None:
    code = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever this runs
from qvl.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_ctrl_c_in_a_command_is_exit_code_130() -> None:
    """The command hears of it once it has loaded, and puts away what it has begun."""
    code = """
import os, signal, sys
from qvl.cli import version
def interrupted(package):
    os.kill(os.getpid(), signal.SIGINT)
version.installed = interrupted
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[1:] = ["version"]
from qvl.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")
