"""Killed at random moments and resumed: every line answered, in order, none twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = int(os.environ.get("QVL_KILL_LINES", "300"))
KILLS = int(os.environ.get("QVL_KILLS", "3"))
AT_ONCE = 8
SECONDS = float(os.environ.get("QVL_KILL_ANSWER_SECONDS", "0.04"))


class Server:
    """`scripted.py` in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        self._process = process

    def answer(self, most: int) -> None:
        """That many requests in all, and no more until it is told again."""
        assert self._process.stdin is not None
        print(most, file=self._process.stdin, flush=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    script = Path(__file__).with_name("scripted.py")
    command = [sys.executable, str(script), "0", str(SECONDS), str(tmp_path / "asked")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Server(process)
        process.kill()


def start(source: Path, output: Path, url: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qvl", "batch", str(source), "-o", str(output), "--base-url", url]
    return subprocess.Popen([*command, "--resume", "--concurrency", str(AT_ONCE), "-q"], cwd=ROOT)


def rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments(tmp_path: Path, server: Server) -> None:
    source, output, part = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    lines = [
        {"custom_id": f"id {i}", "body": {"messages": [{"role": "user", "content": f"t{i}"}]}} for i in range(LINES)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chance = random.Random(7)
    for kill in range(KILLS):
        # However late this process gets its turn, there is something left to do when it kills.
        most = LINES * (kill + 1) // (KILLS + 1)
        server.answer(most)
        process = start(source, output, server.url)
        goal = chance.randint(rows(part) + 1, most - AT_ONCE * (kill + 1))
        while rows(part) < goal and process.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, SECONDS))
        assert process.poll() is None, "it ended before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(120) == -signal.SIGKILL
        assert not output.exists()
        assert goal <= rows(part) < LINES
    server.answer(LINES * 2)
    assert start(source, output, server.url).wait(600) == 0

    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == [line["custom_id"] for line in lines]
    texts = [a["response"]["body"]["choices"][0]["message"]["content"] for a in answers]
    assert texts == [f"t{i}" for i in range(LINES)]
    assert not part.exists()
    # Asked twice were only those whose answer was under way when the process died: at most AT_ONCE a kill.
    asked = Counter((tmp_path / "asked").read_text().split())
    assert set(asked) == set(texts)
    assert sum(asked.values()) - LINES <= AT_ONCE * KILLS
