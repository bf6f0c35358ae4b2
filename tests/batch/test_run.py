"""A whole batch against a server that misbehaves, over a real socket: one answer a line, in order, whatever happens."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qvl.batch import Asker, BatchOptions, Defaults, JsonLines, Report, over_http, run_batch
from qvl.errors import ConfigError, InvalidRequest, QvlError, Unauthorized, Unavailable
from tests.batch.scripted import Answer, Script, Scripted, echo, refusal, scripted, text_of


def write_input(folder: Path, count: int, extra: dict[int, str] | None = None) -> JsonLines:
    path = folder / "in.jsonl"
    lines = [
        {"custom_id": f"id{i}", "body": {"messages": [{"role": "user", "content": f"t{i}"}]}} for i in range(count)
    ]
    texts = [(extra or {}).get(i, json.dumps(line)) for i, line in enumerate(lines)]
    path.write_text("\n".join(texts) + "\n")
    return JsonLines(path)


def batch(source: JsonLines, server: Scripted, timeout: float = 120.0, **how: Any) -> Report:
    async def open_asker() -> Asker:
        return await over_http.connect(server.url, model=None, api_key="secret", timeout=timeout)

    return asyncio.run(run_batch(source, source.base / "out.jsonl", open_asker, BatchOptions(**how)))


def outcome(folder: Path) -> list[tuple[str, str]]:
    """(custom_id, text or error code) of every line."""
    told = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    return [
        (
            a["custom_id"],
            a["error"]["code"] if a["error"] else a["response"]["body"]["choices"][0]["message"]["content"],
        )
        for a in told
    ]


def expected(count: int, **other: str) -> list[tuple[str, str]]:
    return [(f"id{i}", other.get(f"id{i}", f"t{i}")) for i in range(count)]


def first(times: int, answer: Callable[[], Answer], only: str | None = None) -> Script:
    """The first `times` that a text (or only this one) is asked, `answer`; then its echo."""
    return lambda body, asked: answer() if asked < times and only in (None, text_of(body)) else echo(body)


def test_every_line_is_answered_once_and_in_order(tmp_path: Path) -> None:
    def uneven(body: dict[str, Any], asked: int) -> Answer:
        answer = echo(body)
        answer.seconds = hash(text_of(body)) % 20 / 1000
        return answer

    with scripted(uneven) as server:
        report = batch(write_input(tmp_path, 200), server, concurrency=16)
    assert outcome(tmp_path) == expected(200)
    assert set(server.asked.values()) == {1}
    assert 12 <= server.most <= 16
    assert set(server.keys) == {"bearer secret"}
    assert {body["model"] for body in server.bodies} == {"scripted"}
    assert (report.answered, report.failed, report.done, report.asked_again) == (200, 0, 200, 0)
    assert report.completion_tokens == 600
    assert report.prompt_tokens == sum(len(f"t{i}") for i in range(200))
    assert len(report.slowest) == 5
    assert report.concurrency == server.most
    assert not (tmp_path / "out.jsonl.part").exists()


def test_it_grows_by_itself(tmp_path: Path) -> None:
    def slow(body: dict[str, Any], asked: int) -> Answer:
        answer = echo(body)
        answer.seconds = 0.1
        return answer

    with scripted(slow) as server:
        batch(write_input(tmp_path, 400), server)
    assert server.most >= 24
    assert outcome(tmp_path) == expected(400)


def test_errors_stay_with_their_lines(tmp_path: Path) -> None:
    def picky(body: dict[str, Any], asked: int) -> Answer:
        return refusal(400, "invalid_media") if text_of(body) == "t3" else echo(body)

    source = write_input(
        tmp_path, 8, {1: "{broken", 5: '{"custom_id": "id5", "body": {"messages": [], "stream": true}}'}
    )
    with scripted(picky) as server:
        report = batch(source, server)
    wanted = expected(8, id3="invalid_media", id5="invalid_value")
    wanted[1] = ("line-2", "invalid_value")
    assert outcome(tmp_path) == wanted
    assert (report.answered, report.failed) == (5, 3)
    assert report.errors == {"invalid_media": 1, "invalid_value": 2}
    assert server.asked["t3"] == 1  # what is refused is not asked again


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: refusal(500),
        lambda: refusal(502),
        lambda: Answer(None),
        lambda: Answer(200, b"<html>"),
        lambda: Answer(200, b'{"choices": ['),
        lambda: refusal(503),
        lambda: refusal(429, "slow_down"),
    ],
    ids=["500", "502", "lost", "html", "torn", "503", "429"],
)
def test_what_passes_is_asked_again(tmp_path: Path, trouble: Callable[[], Answer]) -> None:
    with scripted(first(1, trouble, only="t4")) as server:
        report = batch(write_input(tmp_path, 12), server, concurrency=4)
    assert outcome(tmp_path) == expected(12)
    assert server.asked == {f"t{i}": 2 if i == 4 else 1 for i in range(12)}
    assert report.asked_again == 1


@pytest.mark.parametrize(
    "answer, code", [(lambda: refusal(500, "boom"), "boom"), (lambda: Answer(None), "request_failed")]
)
def test_what_does_not_pass_is_recorded(tmp_path: Path, answer: Callable[[], Answer], code: str) -> None:
    with scripted(first(99, answer, only="t2")) as server:
        report = batch(write_input(tmp_path, 5), server, retries=1)
    assert outcome(tmp_path) == expected(5, id2=code)
    assert server.asked["t2"] == 2
    assert (report.failed, report.asked_again) == (1, 1)


def test_an_answer_that_takes_too_long_is_lost(tmp_path: Path) -> None:
    with scripted(lambda body, asked: Answer(200, b"{}", seconds=600)) as server:
        batch(write_input(tmp_path, 1), server, retries=0, timeout=0.3)
    assert outcome(tmp_path) == expected(1, id0="request_failed")


def test_a_busy_server_is_given_the_time_it_asks_for(tmp_path: Path) -> None:
    times: list[float] = []

    def busy_once(body: dict[str, Any], asked: int) -> Answer:
        times.append(time.monotonic())
        return refusal(429, "slow_down", Retry_After="1") if len(times) <= 8 else echo(body)

    with scripted(busy_once) as server:
        batch(write_input(tmp_path, 30), server, concurrency=8, retries=0)
    assert outcome(tmp_path) == expected(30)  # a busy server is nobody's error, however few retries there are
    assert times[8] - times[7] >= 0.9
    assert server.most <= 8


def test_a_server_that_takes_few_at_once_gets_few(tmp_path: Path) -> None:
    def narrow(body: dict[str, Any], asked: int) -> Answer:
        if server.running > 4:
            return refusal(429, "slow_down", Retry_After="0.05")
        answer = echo(body)
        answer.seconds = 0.01
        return answer

    with scripted(narrow) as server:
        report = batch(write_input(tmp_path, 200), server, concurrency=64)
    assert outcome(tmp_path) == expected(200)
    assert report.asked_again < 150  # 60 of the first burst, and few after that


def test_a_wrong_key_ends_the_batch(tmp_path: Path) -> None:
    with scripted(lambda body, asked: refusal(401, "invalid_api_key")) as server, pytest.raises(Unauthorized):
        batch(write_input(tmp_path, 50), server, concurrency=2)
    assert sum(server.asked.values()) <= 4
    assert not (tmp_path / "out.jsonl").exists()


def test_a_server_that_goes_away_costs_no_line(tmp_path: Path) -> None:
    """It dies in the middle of the run; the run waits, gives up, and --resume goes on."""
    source = write_input(tmp_path, 60)
    count = 0

    def dying(body: dict[str, Any], asked: int) -> Answer:
        nonlocal count
        count += 1
        return echo(body) if count <= 25 else refusal(503)

    with scripted(dying) as server, pytest.raises(Unavailable, match="answered nothing"):
        batch(source, server, patience=1.2, concurrency=8)
    kept = (tmp_path / "out.jsonl.part").read_text().splitlines()
    assert len(kept) == 25
    assert all(json.loads(row)["error"] is None for row in kept)
    with pytest.raises(ConfigError, match="--resume"):
        batch(source, server)
    with scripted() as server:
        report = batch(source, server, resume=True)
    assert outcome(tmp_path) == expected(60)
    assert (report.before, report.answered, sum(server.asked.values())) == (25, 35, 35)


def test_nobody_there_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no server answers"):
        batch(write_input(tmp_path, 3), Scripted(echo, url="http://127.0.0.1:9"))


def test_a_finished_batch_asks_nothing(tmp_path: Path) -> None:
    source = write_input(tmp_path, 5)
    with scripted() as server:
        batch(source, server)
        before = (tmp_path / "out.jsonl").read_bytes()
        report = batch(source, server, resume=True)
        assert sum(server.asked.values()) == 5
    assert (report.before, report.answered) == (5, 0)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_failed_lines_can_be_asked_again(tmp_path: Path) -> None:
    source = write_input(tmp_path, 6)
    with scripted(first(1, lambda: refusal(400, "no"), only="t3")) as server:
        assert batch(source, server).failed == 1
        assert outcome(tmp_path) == expected(6, id3="no")
        report = batch(source, server, retry_failed=True)
        assert server.asked == {f"t{i}": 1 + (i == 3) for i in range(6)}
    assert (report.answered, report.failed, report.any_failed) == (1, 0, False)
    assert outcome(tmp_path) == expected(6)


def test_input_that_changes_under_our_hands_ends_the_batch(tmp_path: Path) -> None:
    source = write_input(tmp_path, 40)

    def edit(body: dict[str, Any], asked: int) -> Answer:
        if text_of(body) == "t0":
            text = (tmp_path / "in.jsonl").read_text()
            (tmp_path / "in.jsonl").write_text(text.replace('"t30"', '"XXX"'))
        return echo(body)

    with scripted(edit) as server, pytest.raises(QvlError, match="changed at line 31"):
        batch(source, server, concurrency=2)
    assert "XXX" not in server.asked


def test_duplicates_ask_nothing(tmp_path: Path) -> None:
    source = write_input(tmp_path, 3, {2: '{"custom_id": "id0", "body": {"messages": []}}'})
    with scripted() as server, pytest.raises(InvalidRequest, match="line 3 repeats"):
        batch(source, server)
    assert server.asked == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_cancelling_keeps_the_answers_so_far(tmp_path: Path) -> None:
    """What Ctrl-C does to the running loop."""
    source = write_input(tmp_path, 50)

    def slow_end(body: dict[str, Any], asked: int) -> Answer:
        answer = echo(body)
        answer.seconds = 0.0 if int(text_of(body)[1:]) < 20 else 60.0
        return answer

    async def run() -> None:
        async def open_asker() -> Asker:
            return await over_http.connect(server.url, model="m", api_key=None, timeout=60)

        running = asyncio.ensure_future(run_batch(source, tmp_path / "out.jsonl", open_asker, BatchOptions(4)))
        part = tmp_path / "out.jsonl.part"
        while not part.exists() or part.read_bytes().count(b"\n") < 20:
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    with scripted(slow_end) as server:
        asyncio.run(run())
    with scripted() as server:
        assert batch(source, server, resume=True).before == 20
    assert outcome(tmp_path) == expected(50)


def test_what_the_lines_lack_is_filled_in(tmp_path: Path) -> None:
    with scripted() as server:
        batch(write_input(tmp_path, 1), server, defaults=Defaults("ours", {"max_tokens": 7}))
    assert (server.bodies[0]["model"], server.bodies[0]["max_tokens"]) == ("ours", 7)
