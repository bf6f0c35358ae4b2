"""What a load is made of and what is made of its answers: cases, prompts, the stopwatch, figures and the plot."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json

import pytest
from PIL import Image

from qvl.bench.load.answer import Outcome, Stopwatch
from qvl.bench.load.cases import CASES, Load, sweep
from qvl.bench.load.figures import Spread, summarise, table_head, table_row
from qvl.bench.load.http import Address
from qvl.bench.load.prompts import bodies, picture
from qvl.bench.load.worker import Job, Target
from qvl.errors import ConfigError

TEXT = Load("text", 8, 2, None, 5, 3, pictures=0)


def events(*values: object, end: str = "\n\n") -> bytes:
    lines = [f"data: {value if isinstance(value, str) else json.dumps(value)}{end}" for value in values]
    return "".join(lines).encode()


def piece(text: str | None, **more: object) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text}, **more}]}


def read(stream: bytes, size: int, status: int = 200) -> Outcome:
    """The outcome of a stream that comes `size` bytes at a time, one tick of the clock each."""
    clock = itertools.count(1)
    outcome = Outcome(0.0)
    watch = Stopwatch(outcome, lambda: float(next(clock)))
    for start in range(0, len(stream), size):
        (watch.feed if status == 200 else watch.refuse)(stream[start : start + size])
    watch.finish(status)
    return outcome


def test_the_same_answer_however_it_is_cut() -> None:
    stream = events(piece(""), piece("né"), piece("o"), piece(None), {"usage": {"completion_tokens": 4}}, "[DONE]")
    for size in range(1, len(stream) + 1):
        outcome = read(stream, size)
        assert (outcome.error, outcome.chunks, outcome.output_tokens, len(outcome.gaps)) == ("", 2, 4, 1)
        assert outcome.first <= outcome.last
    by_the_byte = read(stream, 1)
    ends = [i + 1 for i in range(len(stream)) if stream[i : i + 2] == b"\n\n"]  # where each event's line is complete
    assert by_the_byte.first == by_the_byte.ttft == ends[1]  # the empty piece before is no text
    assert by_the_byte.gaps == [ends[2] - ends[1]]
    assert by_the_byte.last == by_the_byte.e2e == ends[3]  # usage alone is no part of the answer
    assert by_the_byte.tpot == (ends[3] - ends[1]) / 3


@pytest.mark.parametrize("end", ["\r\n\r\n", "\n\n"])
def test_spellings_of_an_event_stream(end: str) -> None:
    stream = b": a comment\n\nevent: x\nid: 1\n" + events(piece("a"), "[DONE]", end=end).replace(b"data: ", b"data:")
    assert read(stream, 3).error == ""
    assert read(stream, 3).output_tokens == 1  # nothing was counted, so pieces are


def test_thoughts_are_tokens_too() -> None:
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    outcome = read(events(thought, piece("a"), "[DONE]"), 1000)
    assert (outcome.chunks, outcome.error) == (2, "")


def test_an_answer_without_text_still_ends() -> None:
    outcome = read(events(piece("", finish_reason="stop"), {"usage": {"completion_tokens": 1}}, "[DONE]"), 10)
    assert (outcome.error, outcome.first, outcome.tpot) == ("", outcome.last, None)


def test_an_error_of_null_is_none() -> None:
    assert read(events(piece("a") | {"error": None}, "[DONE]"), 7).error == ""


def test_a_count_tells_of_a_token_that_has_no_text_yet() -> None:
    def counted(text: str, tokens: int) -> dict[str, object]:
        return {**piece(text), "usage": {"completion_tokens": tokens}}

    role, half, whole = counted("", 0), counted("", 1), counted("é", 2)
    stream = events(role, half, whole, piece("", finish_reason="stop"), "[DONE]")
    outcome = read(stream, 1)
    ends = [i + 1 for i in range(len(stream)) if stream[i : i + 2] == b"\n\n"]
    assert (outcome.first, outcome.chunks, outcome.output_tokens) == (ends[1], 1, 2)
    assert outcome.tpot == ends[3] - ends[1]


def test_an_answer_in_one_piece_says_nothing_about_its_tokens() -> None:
    stream = events(piece("abc", finish_reason="stop"), {"usage": {"completion_tokens": 3}}, "[DONE]")
    outcome = read(stream, 1)
    assert (outcome.error, outcome.first, outcome.tpot) == ("", outcome.last, None)
    figures = summarise(TEXT, [outcome, answered(0, 1, 1, 3)], wall=1, processes=1, client_cpu=0)
    assert figures.whole_answers == 1
    assert figures.tpot_ms == Spread.of([1.0])
    assert figures.doubts == ["1 answers came in one piece: their TTFT is the time of the whole answer"]


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (events(piece("a")), "the stream ended without [DONE]"),
        (events("[DONE]"), "the stream held no chunk of an answer"),
        (events({"usage": {"completion_tokens": 1}}, "[DONE]"), "the stream held no chunk of an answer"),
        (events("{not json", "[DONE]"), "an event that is no chunk: "),
        (events({"choices": 3}, "[DONE]"), "an event that is no chunk: "),
        (events(piece("a"), {"error": {"message": "no\nmore"}}), "error in the stream: no more"),
        (events(piece("a"), {"error": "no more"}, "[DONE]"), "error in the stream: no more"),
    ],
)
def test_streams_that_are_errors(stream: bytes, error: str) -> None:
    for size in (1, 7, len(stream)):
        assert read(stream, size).error.startswith(error)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"error": {"message": "too long"}}', "HTTP 400: too long"),
        (b'{"error": "too long"}', "HTTP 400: too long"),
        (b'{"detail": "Not Found"}', 'HTTP 400: {"detail": "Not Found"}'),
        (b"<html>bad\n gateway</html>", "HTTP 400: <html>bad gateway</html>"),
        (b"", "HTTP 400:"),
    ],
)
def test_refusals(body: bytes, error: str) -> None:
    assert read(body, 4, status=400).error == error


def test_the_cases_are_the_rows_of_the_table() -> None:
    """requests, concurrency, words + tokens, pictures, side: as docs/performance.md states them."""
    rows = {
        "text-latency": (4, 1, 128, 256, 0, 1024),
        "image-latency": (12, 1, 32, 64, 1, 1024),
        "image-throughput": (256, 64, 64, 128, 1, 1024),
        "image-small-throughput": (512, 128, 64, 128, 1, 448),
        "text-throughput": (1024, 256, 512, 256, 0, 1024),
        "same-image": (128, 32, 64, 64, 1, 1024),
        "multi-image": (64, 16, 64, 128, 4, 1024),
    }
    found = {
        n: (c.requests, c.concurrency, c.input_tokens, c.output_tokens, c.pictures, c.width) for n, c in CASES.items()
    }
    assert found == rows
    assert [name for name, case in CASES.items() if case.same_picture] == ["same-image"]
    assert all(case.height == case.width for case in CASES.values())


@pytest.mark.parametrize(
    "wrong", [{"rate": 1.0}, {"concurrency": None}, {"concurrency": 0}, {"requests": 0}, {"height": 65_501}]
)
def test_loads_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(TEXT, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_that_cannot_be(rate: float) -> None:
    with pytest.raises(ConfigError, match="request rate"):
        dataclasses.replace(TEXT, concurrency=None, rate=rate)


def test_arrivals_are_a_poisson_process() -> None:
    load = dataclasses.replace(TEXT, requests=20_000, concurrency=None, rate=50.0)
    times = load.arrivals()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert times[0] == 0.0
    assert min(gaps) >= 0
    assert mean == pytest.approx(1 / 50, rel=0.03)  # five standard errors
    assert variance**0.5 == pytest.approx(mean, rel=0.05)  # what tells an exponential gap from an even one
    assert times == load.arrivals() != dataclasses.replace(load, seed=2).arrivals()


def test_every_request_is_sent_by_exactly_one_process() -> None:
    target = Target(Address("http", "h", 1, ""), "m")
    for requests, streams, processes in ((10, 7, 3), (5, 5, 5), (64, 8, 1)):
        load = dataclasses.replace(TEXT, requests=requests, concurrency=streams)
        jobs = [Job(target, load, 0, i, processes) for i in range(processes)]
        assert sorted(index for job in jobs for index in job.requests) == list(range(requests))
        assert sum(job.streams for job in jobs) == streams
        assert min(job.streams for job in jobs) >= 1


def test_a_sweep_asks_anew_at_every_level() -> None:
    points = sweep(TEXT, concurrencies=[1, 16])
    assert [(p.level, p.requests, p.rate) for p in points] == [(1, 8, None), (16, 64, None)]
    rates = sweep(TEXT, rates=[0.5, 2.0])
    assert [(p.level, p.concurrency) for p in rates] == [(0.5, None), (2.0, None)]
    texts = [body for p in points + sweep(TEXT, rates=[1, 16]) for body in bodies(p, range(p.requests), {}, 5)]
    assert len(set(texts)) == len(texts)


def test_bodies() -> None:
    load = Load("x", 3, 1, None, 6, 9, pictures=2, width=40, height=30)
    options = {"model": "m", "ignore_eos": True, "temperature": None}
    first, second = (json.loads(body) for body in bodies(load, range(2), options, 6))
    content = first["messages"][0]["content"]
    assert {k: v for k, v in first.items() if k != "messages"} == {
        "model": "m",
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert len(content[2]["text"].split()) == 6
    urls = [part["image_url"]["url"] for m in (first, second) for part in m["messages"][0]["content"][:2]]
    assert len(set(urls)) == 4
    for url in urls:
        head, _, data = url.partition(",")
        shown = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (head, shown.format, shown.size) == ("data:image/jpeg;base64", "JPEG", (40, 30))
    assert list(bodies(load, range(1, 2), options, 6)) == list(bodies(load, range(2), options, 6))[1:]


def test_the_same_picture_is_one_picture_with_different_questions() -> None:
    load = Load("x", 3, 1, None, 6, 9, width=40, height=30, same_picture=True)
    contents = [json.loads(body)["messages"][0]["content"] for body in bodies(load, range(3), {}, 6)]
    assert len({content[0]["image_url"]["url"] for content in contents}) == 1
    assert len({content[1]["text"] for content in contents}) == 3
    for change in ({"seed": 2}, {"name": "y"}, {"concurrency": 2}):
        other = json.loads(next(bodies(dataclasses.replace(load, **change), range(1), {}, 6)))
        assert other["messages"][0]["content"][0] != contents[0][0]


def test_pictures_weigh_what_photographs_weigh() -> None:
    """The table's pictures are about 190 KB at 1024x1024: decoding is part of what is measured."""
    assert 170_000 < len(picture(1024, 1024, 1)) < 210_000
    assert picture(64, 48, 1) == picture(64, 48, 1) != picture(64, 48, 2)
    assert Image.open(io.BytesIO(picture(1, 1, 1))).size == (1, 1)


def answered(start: float, ttft: float, tpot: float, tokens: int) -> Outcome:
    first = start + ttft
    return Outcome(start, first, first + tpot * (tokens - 1), 10, tokens, tokens, [tpot] * (tokens - 1))


def test_figures() -> None:
    outcomes = [answered(i, 0.001 * (i + 1), 0.002, 3) for i in range(100)]
    outcomes += [Outcome(7.0, error="later"), Outcome(3.0, error="sooner")]
    figures = summarise(TEXT, outcomes, wall=50.0, processes=2, client_cpu=0.9)
    assert (figures.requests, figures.errors, figures.first_error) == (102, 2, "sooner")
    assert (figures.req_s, figures.out_tok_s, figures.in_tok_s, figures.chunks_s) == (2.0, 6.0, 20.0, 6.0)
    assert figures.ttft_ms == Spread(mean=50.5, p50=51.0, p90=91.0, p99=100.0, max=100.0)
    assert figures.tpot_ms == Spread(2.0, 2.0, 2.0, 2.0, 2.0)
    assert figures.itl_ms == Spread(2.0, 2.0, 2.0, 2.0, 2.0)
    assert figures.e2e_ms is not None
    assert figures.e2e_ms.p50 == pytest.approx(55.0)
    assert figures.short_answers == 0
    assert [doubt.split()[0] for doubt in figures.doubts] == ["2", "a"]
    assert len(table_head()) == len(table_row(figures))


def test_short_answers_are_told() -> None:
    figures = summarise(TEXT, [answered(0, 1, 1, 2), answered(0, 1, 1, 3)], wall=1, processes=1, client_cpu=0)
    assert figures.short_answers == 1
    assert figures.doubts == ["1 answers had fewer than 3 tokens"]


def test_nothing_answered_is_no_figure() -> None:
    figures = summarise(TEXT, [Outcome(0.0, error="gone")], wall=1.0, processes=1, client_cpu=0.0)
    assert (figures.ttft_ms, figures.tpot_ms, figures.itl_ms, figures.e2e_ms) == (None, None, None, None)
    assert figures.req_s == 0.0
    assert table_row(figures).split()[-7:] == ["-"] * 7
