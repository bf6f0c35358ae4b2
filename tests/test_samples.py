"""The bundled checkpoint answers the sample pictures: in process, over HTTP, from the command line, and 32 at once.

samples/questions.json says what is asked and what is right: a text, or a box in pixels of the picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qvl.backends.local import LocalBackend
from qvl.cli.app import run
from qvl.client import Client, question
from qvl.engine.locate import demo_folder
from qvl.engine.options import EngineOptions
from qvl.types import SamplingParams
from tests.server.live import Live, live

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
QUESTIONS: list[dict[str, Any]] = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(max_tokens=128, temperature=0.0)
MAX_BYTES, MAX_PARAMETERS = 24_000_000, 12_000_000
STREAMS = 32


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(LocalBackend(EngineOptions(model="demo", num_threads=1))) as running:
        yield running


def files(one: dict[str, Any]) -> list[Path]:
    return [SAMPLES / name for name in one["media"]]


def check(one: dict[str, Any], answer: str) -> None:
    """The exact text; a box by its overlap with the drawn one."""
    if "answer" in one:
        assert answer == one["answer"]
        return
    numbers = [int(number) for number in re.findall(r"\d+", answer)][-4:]
    assert len(numbers) == 4, answer
    width, height = Image.open(files(one)[0]).size
    told = [n * side / 1000 for n, side in zip(numbers, (width, height) * 2, strict=True)]
    assert overlap(told, one["box"]) >= 0.8, answer


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return across / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - across)


def test_the_bundled_checkpoint_is_small() -> None:
    from qvl.specs import load_spec

    assert load_spec(demo_folder()).num_parameters <= MAX_PARAMETERS
    assert sum(path.stat().st_size for path in demo_folder().rglob("*") if path.is_file()) <= MAX_BYTES


def test_in_process() -> None:
    from qvl import LLM

    llm = LLM("demo", num_threads=1)
    for one in QUESTIONS:
        messages = question(one["ask"], files(one))
        completion = llm.chat(messages, GREEDY)
        assert isinstance(completion.text, str)
        check(one, completion.text)
        assert "".join(delta.text for delta in llm.stream(messages, GREEDY)) == completion.text


def test_over_http(server: Live) -> None:
    with Client(server.url) as client:
        for one in QUESTIONS:
            check(one, client.ask(one["ask"], *files(one), sampling=GREEDY))


def test_from_the_command_line(server: Live, capsys: pytest.CaptureFixture[str]) -> None:
    for one in QUESTIONS:
        assert run(["ask", one["ask"], *map(str, files(one)), "--temperature", "0", "--base-url", server.url]) == 0
        check(one, capsys.readouterr().out.removesuffix("\n"))


def test_many_streams_at_once(server: Live) -> None:
    """Every stream of 32 says what the same question says alone."""

    def stream(one: dict[str, Any]) -> str:
        with Client(server.url) as client:
            return "".join(delta.text for delta in client.stream(question(one["ask"], files(one)), GREEDY))

    chosen = [QUESTIONS[i % len(QUESTIONS)] for i in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        for one, answer in zip(chosen, pool.map(stream, chosen), strict=True):
            check(one, answer)


def test_a_second_turn_needs_no_new_picture(server: Live) -> None:
    note = QUESTIONS[0]
    with Client(server.url) as client:
        turns: list[Any] = [*question(note["ask"], files(note))]
        turns.append({"role": "assistant", "content": client.chat(turns, GREEDY).text})
        turns.append({"role": "user", "content": "and the second line?"})
        assert client.chat(turns, GREEDY).text == note["answer"].splitlines()[1]
