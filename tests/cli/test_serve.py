"""`qvl serve`: flags become options, and the real command serves, answers and drains."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qvl.cli.app import run
from qvl.cli.familiar import HINTS
from qvl.cli.serve import serve
from qvl.client import Client
from qvl.engine.options import EngineOptions
from qvl.server.options import ServerOptions
from qvl.types import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
Options = tuple[EngineOptions, ServerOptions]
Parse = Callable[..., Options]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """The options that a command line stands for; nothing is started."""
    seen: list[Options] = []

    def fake_start(server: ServerOptions, engine: EngineOptions, count: int) -> int:
        seen.append((engine, server))
        return 0

    monkeypatch.setattr("qvl.server.start.start", fake_start)
    monkeypatch.setattr("qvl.cli.serve.load_spec", lambda folder: None)
    monkeypatch.setattr("qvl.cli.serve.find_model", Path)
    monkeypatch.delenv("QVL_API_KEY", raising=False)

    def of(*arguments: str) -> Options:
        assert run(["serve", *arguments]) == 0
        return seen.pop()

    return of


def test_defaults_are_those_of_the_options(parse: Parse) -> None:
    assert parse() == (EngineOptions(), ServerOptions())


def test_every_engine_option_has_its_flag() -> None:
    """`allow_any_local_path` is for in-process use: a server that reads any file for its callers is never meant."""
    flags = set(inspect.signature(serve).parameters)
    assert {f.name for f in dataclasses.fields(EngineOptions)} - flags == {"allow_any_local_path"}


def test_hints_are_for_flags_that_there_are_not() -> None:
    flags = set(inspect.signature(serve).parameters) - {"model"}  # an argument
    assert not {hint.removeprefix("--").replace("-", "_") for hint in HINTS} & flags


def test_how_many_http_processes(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--api-server-count", "1") == (EngineOptions(), ServerOptions())
    seen: list[int] = []
    monkeypatch.setattr("qvl.server.start.start", lambda server, options, count: seen.append(count) or 0)
    assert run(["serve", "--api-server-count", "3"]) == 0
    assert run(["serve", "--api_server_count=2", "--port", "0"]) == 0
    assert seen == [3, 2]
    for bad in ("0", "-1", "many", "1000"):
        assert run(["serve", "--api-server-count", bad]) == 2


KNOWN = [
    ("--host", "0.0.0.0"),
    ("--port", "8001"),
    ("--dtype", "half"),
    ("--max-model-len", "8784"),
    ("--gpu-memory-utilization", "0.8"),
    ("--limit-mm-per-prompt", "image=6"),
    ("--served-model-name", "vision"),
    ("--tensor-parallel-size", "1"),
    ("--pipeline-parallel-size", "1"),
    ("--max-num-seqs", "16"),
    ("--max-num-batched-tokens", "4096"),
    ("--mm-processor-kwargs", '{"max_pixels": 1003520}'),
    ("--api-key", "k"),
    ("--seed", "7"),
    ("--device", "cpu"),
    ("--load-format", "dummy"),
    ("--kv-cache-memory", "2GiB"),
]


@pytest.mark.parametrize(("flag", "value"), KNOWN)
def test_four_spellings_of_a_flag(parse: Parse, flag: str, value: str) -> None:
    underscores = "--" + flag[2:].replace("-", "_")
    spellings = [(flag, value), (underscores, value), (f"{flag}={value}",), (f"{underscores}={value}",)]
    options = [parse("model", *spelling) for spelling in spellings]
    assert all(one == options[0] for one in options)
    unchanged = ("--tensor-parallel-size", "--pipeline-parallel-size")
    assert (options[0] == parse("model")) == (flag in unchanged)


def test_the_command_line_of_the_field(parse: Parse) -> None:
    engine, server = parse(
        "Qwen2-VL-7B", "--dtype", "auto", "--port", "8000", "--limit_mm_per_prompt", "image=4",
        "--max_model_len", "8784", "--gpu_memory_utilization", "0.8", "--no-enable-prefix-caching",
        "--served-model-name", "a", "--served-model-name", "b", "--kv_cache_memory", "1.5g", "--max-body-size", "1MiB",
    )  # fmt: skip
    assert engine == EngineOptions(
        model="Qwen2-VL-7B",
        served_model_name="a",
        max_model_len=8784,
        gpu_memory_utilization=0.8,
        limit_mm_per_prompt={"image": 4},
        enable_prefix_caching=False,
        kv_cache_memory=3 << 29,
    )
    assert server == ServerOptions(served_model_names=("a", "b"), max_body_bytes=1 << 20)


def test_several_names_after_one_flag(parse: Parse) -> None:
    for words in (
        ["folder", "--served-model-name", "a", "b", "--port", "1"],
        ["--port=1", "folder", "--served_model_name=a", "b"],
        ["folder", "--served-model-name", "a", "--port", "1", "--served-model-name", "b"],
    ):
        engine, server = parse(*words)
        assert (engine.model, server.served_model_names, server.port) == ("folder", ("a", "b"), 1)
    engine, server = parse("--served-model-name", "a", "folder")  # the first word on its own is always MODEL
    assert (engine.model, server.served_model_names) == ("folder", ("a",))


@pytest.mark.parametrize(
    "spelling",
    [
        ["--limit-mm-per-prompt", "image=10,video=2"],
        ["--limit-mm-per-prompt", '{"image": 10, "video": 2}'],
        ["--limit-mm-per-prompt", "image=10", "--limit-mm-per-prompt", "video=2"],
    ],
)
def test_limits_of_media(parse: Parse, spelling: list[str]) -> None:
    engine, _ = parse(*spelling)
    assert engine.limit_mm_per_prompt == {"image": 10, "video": 2}


def test_keys_from_the_environment(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVL_API_KEY", "from-env")
    assert parse()[1].api_keys == ("from-env",)
    assert parse("--api-key", "a", "--api-key", "b")[1].api_keys == ("a", "b")


def test_trust_remote_code_says_that_it_does_nothing(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    parse("--trust-remote-code")
    assert "does nothing" in capsys.readouterr().err


@contextmanager
def served(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The ready line of a real `qvl serve`, and its process; killed if the test did not end it."""
    command = [sys.executable, "-m", "qvl", "serve", *arguments, "--port", "0", "--num-threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline(), process
    finally:
        process.kill()
        process.wait()


def test_a_checkpoint_becomes_a_server_and_drains(checkpoint: Path) -> None:
    with served(str(checkpoint), "--served-model-name", "tiny", "--max-model-len", "512", "--dtype", "float32") as (
        line,
        process,
    ):
        ready = re.match(
            r"qvl ready: (http://\S+)  model tiny  device cpu.*  dtype float32  KV cache ([\d,]+) tokens", line
        )
        assert ready, line
        with Client(ready[1]) as client:
            assert client.models() == ["tiny"]
            greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            completion = client.chat("Hello", greedy)
            assert completion.usage.completion_tokens == 8
            assert "".join(delta.text for delta in client.stream("Hello", greedy)) == completion.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0


def test_a_folder_that_cannot_be_served_ends_with_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    command = [sys.executable, "-m", "qvl", "serve", str(tmp_path), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "llama" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_cannot_be_loaded_is_told_once(checkpoint: Path, tmp_path: Path) -> None:
    """What is found only while loading comes after the line that HTTP is up, as one line too."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "cut"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    command = [sys.executable, "-m", "qvl", "serve", str(folder), "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    up, reason = done.stderr.splitlines()
    assert "HTTP is up" in up
    assert reason.startswith("qvl: model.safetensors is truncated")
