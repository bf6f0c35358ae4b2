"""`qvl bench serve` from the command line to a real socket: what it sends, counts, prints and refuses."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from qvl.backends.echo import EchoBackend
from qvl.bench.load import run as load_run
from qvl.bench.load import worker
from qvl.bench.load.answer import Outcome
from qvl.bench.load.cases import CASES, Load
from qvl.bench.load.http import Address
from qvl.bench.load.worker import Job, Report, Target
from qvl.cli.app import run
from qvl.errors import RequestFailed
from qvl.server.options import ServerOptions
from qvl.types import ChatRequest, Delta, MediaPart
from tests.server.live import Live, live

QUICK = ["--processes", "1", "--warm-up", "0"]


class Watched(EchoBackend):
    """Keeps what it was asked, and how many requests were under way at most. Answers wait for `hold` to be asked."""

    def __init__(self, hold: int = 0, max_model_len: int = 4096) -> None:
        super().__init__(max_model_len=max_model_len)
        self.asked: list[ChatRequest] = []
        self.most = 0
        self._now = 0
        self._hold = hold

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        self.asked.append(request)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            # Probes have 64 words and more; what is held back are the requests of the load.
            while len([r for r in self.asked if len(text_of(r)) < 64]) < self._hold and len(text_of(request)) < 64:
                await asyncio.sleep(0.01)
            async for delta in super().chat(request, request_id):
                yield delta
        finally:
            self._now -= 1


def text_of(request: ChatRequest) -> str:
    return "".join(part.text for part in request.messages[-1].parts if not isinstance(part, MediaPart))


@pytest.fixture
def backend() -> Watched:
    return Watched()


@pytest.fixture
def server(backend: Watched) -> Iterator[Live]:
    with live(backend) as running:
        yield running


def bench(url: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], dict[str, Any], str]:
    """Exit code, the table, the JSON object of the last line, and what was said beside."""
    code = run(["bench", "serve", *arguments, "--base-url", url])
    out, err = capsys.readouterr()
    *table, last = out.splitlines()
    return code, table, json.loads(last), err


def test_a_closed_loop(server: Live, backend: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--requests", "12", "--concurrency", "4", "--input-tokens", "30", "--output-tokens", "7"]
    pictures = ["--num-pictures", "2", "--picture", "40x30", "--processes", "2", "--warm-up", "5"]
    code, table, record, err = bench(server.url, capsys, *flags, *pictures)
    assert code == 0, err
    (figures,) = record["runs"]
    assert (record["bench"], record["model"], record["url"]) == ("serve", "echo", server.url)
    assert (figures["requests"], figures["errors"], figures["first_error"]) == (12, 0, None)
    assert (figures["output_tokens"], figures["short_answers"], figures["processes"]) == (7, 0, 2)
    assert figures["req_s"] == pytest.approx(12 / figures["wall_s"], rel=0.05)
    assert figures["out_tok_s"] == pytest.approx(84 / figures["wall_s"], rel=0.05)
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        spread = figures[name]
        assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"] <= spread["max"]
    assert figures["ttft_ms"]["p50"] <= figures["e2e_ms"]["p50"]
    assert figures["load"]["pictures"] == 2
    assert len(table) == 2
    assert table[1].split()[:4] == ["custom", "4", "12", "0"]
    probes, load = backend.asked[:2], backend.asked[2:]
    assert [request.sampling.max_tokens for request in probes] == [1, 1]
    assert len(load) == 12 + 5
    assert len({text_of(request) for request in load}) == 17  # the warm-up asks for other things
    assert {(r.sampling.temperature, r.sampling.ignore_eos, r.sampling.max_tokens) for r in load} == {(0.0, True, 7)}
    assert all(sum(isinstance(part, MediaPart) for part in r.messages[-1].parts) == 2 for r in load)
    # One character is one token here: the probes showed how many words make 30 of them.
    assert {len(text_of(request).split()) for request in load} == {round(30 / record["tokens_per_word"])}
    assert 2 <= backend.most <= 4


def test_the_concurrency_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    backend = Watched(hold=3)
    flags = ["--requests", "30", "--concurrency", "3", "--num-pictures", "0", "--output-tokens", "9"]
    with live(backend) as server:
        code, _, record, err = bench(server.url, capsys, *flags, "--input-tokens", "8", *QUICK)
    assert code == 0, err
    assert backend.most == 3
    assert record["runs"][0]["requests"] == 30


def test_a_second_run_asks_other_things(server: Live, backend: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the probes; with the seed that the JSON names, it asks the same."""
    flags = ["--requests", "2", "--concurrency", "1", "--num-pictures", "0", "--output-tokens", "2", *QUICK]
    _, _, first, _ = bench(server.url, capsys, *flags)
    _, _, second, _ = bench(server.url, capsys, *flags)
    _, _, _, _ = bench(server.url, capsys, *flags, "--seed", str(first["runs"][0]["load"]["seed"]))
    texts = [text_of(request) for request in backend.asked]
    assert first["runs"][0]["load"]["seed"] != second["runs"][0]["load"]["seed"]
    assert len({*texts[2:4], *texts[6:8]}) == 4
    assert texts[10:12] == texts[2:4]


def test_an_open_loop_does_not_wait_for_answers(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is answered before all 20 have arrived: a closed loop would hang, and so would a loop with a cap."""
    backend = Watched(hold=20)
    with live(backend) as server:
        flags = ["--requests", "20", "--rate", "200", "--input-tokens", "20", "--output-tokens", "4", "--timeout", "60"]
        code, table, record, err = bench(server.url, capsys, *flags, "--num-pictures", "0", *QUICK)
    assert code == 0, err
    assert backend.most == 20
    assert record["runs"][0]["load"]["rate"] == 200
    assert record["runs"][0]["load"]["concurrency"] is None
    assert table[1].split()[1] == "200/s"


async def test_lateness_counts_against_the_server() -> None:
    """A request that was due long ago has that long a latency, whoever was late."""
    with live(EchoBackend()) as server:
        target = Target(Address.read(server.url), "echo")
        bodies = [b'{"model": "echo", "stream": true, "messages": [{"role": "user", "content": "hello"}]}'] * 2
        begin = time.perf_counter() - 5.0
        outcomes = await worker.open_loop(target, bodies, [0.0, 2.0], begin)
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert outcomes[0].ttft > 5.0 > 3.0 < outcomes[1].ttft


def test_the_suite_runs_every_case(server: Live, backend: Watched, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--requests", "2", "--concurrency", "2", "--output-tokens", "3", "--input-tokens", "9"]
    code, table, record, err = bench(server.url + "/v1", capsys, "suite", *flags, "--picture", "32x32", *QUICK)
    assert code == 0, err
    assert [figures["load"]["name"] for figures in record["runs"]] == list(CASES)
    assert [line.split()[0] for line in table[1:]] == list(CASES)
    pictures = [sum(isinstance(p, MediaPart) for p in r.messages[-1].parts) for r in backend.asked[2:]]
    assert pictures == [n for case in CASES.values() for n in [case.pictures] * 2]
    same = list(CASES).index("same-image")
    first, second = backend.asked[2 + 2 * same : 4 + 2 * same]
    assert first.messages[-1].parts[0] == second.messages[-1].parts[0]
    assert text_of(first) != text_of(second)


def test_a_sweep_is_drawn(server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--requests", "2", "--num-pictures", "0", "--output-tokens", "3", "--plot", str(tmp_path / "load.png")]
    code, table, record, err = bench(server.url, capsys, "--sweep", "1,2", *flags, *QUICK)
    assert code == 0, err
    assert [figures["load"]["concurrency"] for figures in record["runs"]] == [1, 2]
    assert [figures["requests"] for figures in record["runs"]] == [4, 8]
    assert len(table) == 3
    with Image.open(io.BytesIO((tmp_path / "load.png").read_bytes())) as plot:
        assert plot.format == "PNG"
    code, _, record, err = bench(server.url, capsys, "--sweep-rates", "50,100.5", *flags, *QUICK)
    assert code == 0, err
    assert [figures["load"]["rate"] for figures in record["runs"]] == [50.0, 100.5]


def test_figures_come_before_a_plot_that_fails(
    server: Live, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measurement took long; a disk that is full must not cost it."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qvl.bench.load.plot.save_plot", full)
    flags = ["--requests", "2", "--num-pictures", "0", "--output-tokens", "3", "--plot", str(tmp_path / "load.png")]
    code, _, record, err = bench(server.url, capsys, "--sweep", "1", *flags, *QUICK)
    assert code == 2
    assert "load.png: No space left" in err
    assert record["runs"][0]["errors"] == 0


def test_failed_requests_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Texts of 150 words do not fit into 600 characters: every request of the load is refused, the run still ends."""
    with live(Watched(max_model_len=600)) as server:
        flags = ["--requests", "3", "--concurrency", "1", "--input-tokens", "150", "--num-pictures", "0"]
        code, _, record, err = bench(server.url, capsys, *flags, *QUICK)
    assert code == 1
    (figures,) = record["runs"]
    assert (figures["requests"], figures["errors"], figures["req_s"], figures["ttft_ms"]) == (3, 3, 0, None)
    assert figures["first_error"].startswith("HTTP 400: the prompt has ")
    assert f"3 of 3 requests failed, the first with: {figures['first_error']}" in err
    assert record["tokens_per_word"] == 1.0  # the longer probe was refused as well


def test_a_server_that_answers_nothing_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """As while a model is loading."""
    with live(Watched(max_model_len=10)) as server:
        assert run(["bench", "serve", "--base-url", server.url]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "a first request of 64 words failed: HTTP 400: the prompt has" in err


def test_the_servers_key(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_API_KEY", raising=False)
    flags = ["--requests", "1", "--concurrency", "1", "--num-pictures", "0", "--output-tokens", "2", *QUICK]
    with live(EchoBackend(), ServerOptions(api_keys=("secret",))) as server:
        assert run(["bench", "serve", "--base-url", server.url, *flags]) == 1
        assert "GET /v1/models: HTTP 401" in capsys.readouterr().err
        code, _, record, err = bench(server.url, capsys, *flags, "--api-key", "secret")
    assert code == 0, err
    assert "secret" not in json.dumps(record)


def test_fields_that_a_server_does_not_know_can_be_left_out(
    server: Live, backend: Watched, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--requests", "1", "--concurrency", "1", "--num-pictures", "0", "--output-tokens", "5", *QUICK]
    extra = ["--no-ignore-eos", "--extra-body", '{"max_tokens": null, "max_completion_tokens": 4, "seed": 3}']
    code, _, record, err = bench(server.url, capsys, *flags, *extra)
    assert code == 0, err
    sampling = backend.asked[-1].sampling
    assert (sampling.ignore_eos, sampling.max_tokens, sampling.seed) == (False, 4, 3)
    assert record["runs"][0]["short_answers"] == 1
    assert "1 answers had fewer than 5 tokens" in err


def test_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--base-url", "http://127.0.0.1:9"]) == 1
    err = capsys.readouterr().err
    assert "no connection to 127.0.0.1:9" in err
    assert "`qvl serve` starts a server" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text-latancy"], "did you mean 'text-latency'?; there are text-latency, "),
        (["--rate", "2", "--concurrency", "3"], "--concurrency and --rate"),
        (["--rate", "0"], "request rate must be above 0"),
        (["--plot", "x.png"], "it needs --sweep"),
        (["--sweep", "1,2", "--plot", "/nowhere/x.png"], "there is no folder"),
        (["--sweep", "1,two"], "--sweep takes numbers"),
        (["--sweep", "0"], "concurrency must be at least 1"),
        (["--sweep", "1", "--sweep-rates", "1"], "one of the two"),
        (["suite", "--sweep", "1"], "not the suite"),
        (["--picture", "big"], "--picture takes a size"),
        (["--sweep", "1,2,1"], "every level once"),
        (["--sweep", "1,2", "--rate", "3"], "leave --concurrency and --rate out"),
        (["--sweep-rates", "1,2", "--concurrency", "3"], "leave --concurrency and --rate out"),
        (["--sweep", "1,2", "--plot", "/tmp"], "name the file"),
        (["--sweep", "1,2", "--plot", "load.jpg"], "name the file"),
        (["text-latency", "--picture", "56x56"], "no pictures in this load"),
        (["--num-pictures", "0", "--same-picture"], "no pictures in this load"),
        (["--picture", "none"], "--num-pictures 0"),
        (["--picture", "66000x4"], "at most 65,500"),
        (["--timeout", "0"], "time-out must be above 0"),
        (["--timeout", "nan"], "time-out must be above 0"),
        (["--picture", "0x5"], "sides of pictures must be at least 1"),
        (["--extra-body", "{"], "--extra-body is not JSON"),
        (["--extra-body", "[]"], "--extra-body takes a JSON object"),
        (["--base-url", "ftp://host"], "no address of a server"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_client_process_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_run, "WORKER", (sys.executable, "-c", "input()"))
    target = Target(Address("http", "127.0.0.1", 9, ""), "m")
    with pytest.raises(RequestFailed, match="a client process died"):
        load_run.measure(target, Load(pictures=0), processes=2, warm_up=0, tell=lambda line: None)


def test_a_client_process_ends_with_the_one_that_started_it() -> None:
    """The job comes, the word to start does not: nothing is sent and nothing waits."""
    job = Job(Target(Address("http", "127.0.0.1", 9, ""), "m"), Load(requests=1, concurrency=1, pictures=0), 0)
    out = io.BytesIO()
    assert worker.main(io.BytesIO(msgspec.json.encode(job) + b"\n"), out) == 1
    assert out.getvalue() == b"ready\n"
    assert worker.main(io.BytesIO(), out) == 1


def test_a_report_comes_whole_through_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a pipe holds, from an interpreter whose own standard output does not gather what it writes."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with live(EchoBackend()) as server:
        load = Load(requests=40, concurrency=8, input_tokens=60, output_tokens=300, pictures=0)
        figures = load_run.measure(
            Target(Address.read(server.url), "echo"), load, processes=1, warm_up=0, tell=lambda line: None
        )
    assert (figures.errors, figures.requests, figures.output_tokens) == (0, 40, 300)


def test_reports_keep_every_field() -> None:
    report = Report([Outcome(1.0, 2.0, 3.5, 4, 5, 6, [0.25], "x")], 1.0, 2.0, 0.5)
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
