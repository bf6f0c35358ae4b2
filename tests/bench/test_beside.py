"""`qvl bench beside`: turns, medians and what is printed, on real sockets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import pytest

from qvl.backends.echo import EchoBackend
from qvl.bench.load import beside
from qvl.bench.load.answer import Outcome
from qvl.bench.load.beside import Comparison, compare, ratio, read_target
from qvl.bench.load.cases import Load
from qvl.bench.load.figures import Figures, summarise
from qvl.bench.load.http import Address
from qvl.bench.load.worker import Target
from qvl.cli.app import run
from qvl.errors import ConfigError, RequestFailed
from qvl.server.options import ServerOptions
from tests.server.live import Live, live


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "REST", 0.0)


@pytest.fixture
def servers() -> Iterator[tuple[Live, Live]]:
    """Tokens come apart enough that a busy client does not read a whole answer at once, which would be an error."""
    with live(EchoBackend(seconds_per_token=0.05)) as one, live(EchoBackend(seconds_per_token=0.05)) as other:
        yield one, other


def target(port: int) -> Target:
    return Target(Address("http", "127.0.0.1", port, ""), "m")


def answered(load: Load, ttft: float, tpot: float, error: str = "") -> Figures:
    """A run of requests that all took as long."""
    outcome = Outcome(0.0, error=error)
    outcome.prompt_tokens, outcome.output_tokens = load.input_tokens + 20, load.output_tokens
    outcome.first, outcome.last = ttft, ttft + tpot * (load.output_tokens - 1)
    return summarise(load, [outcome] * load.requests, wall=outcome.last, processes=1, client_cpu=0.1)


def test_servers_take_turns_on_the_same_prompts_and_medians_count() -> None:
    asked: list[tuple[int, Load]] = []
    rests: list[tuple[float, int]] = []

    def measure(to: Target, load: Load) -> Figures:
        asked.append((to.address.port, load))
        turn = load.seed - 7
        slow = 2.0 if to.address.port == 2 else 1.0
        return answered(load, ttft=slow * (100.0 if turn == 0 else turn), tpot=slow * (turn + 1) / 10)

    comparison = Comparison(input_tokens=50, output_tokens=11, picture=(56, 84), streams=4, rounds=3)
    rest = lambda seconds: rests.append((seconds, len(asked)))  # noqa: E731
    found = compare({"one": target(1), "two": target(2)}, comparison, 7, measure, lambda _: None, rest)
    assert rests == [(beside.REST, asks) for asks in range(0, 24, 3)]  # before each turn
    assert [(port, load.name) for port, load in asked[:6]] == [
        *((1, name) for name in ("text", "picture", "streams")),
        *((2, name) for name in ("text", "picture", "streams")),
    ]
    assert [port for port, load in asked if load.name == "text"] == [1, 2, 2, 1, 1, 2, 2, 1]
    by_port = [{(load.name, load.seed): load for port, load in asked if port == wanted} for wanted in (1, 2)]
    assert by_port[0] == by_port[1]
    assert {load.seed for _, load in asked} == {7, 8, 9, 10}
    one, two = found["one"], found["two"]
    assert one.text_ttft_ms == pytest.approx(2000)  # of 1, 2, 3 s; the round that does not count took 100 s
    assert one.tpot_ms == pytest.approx(300)
    assert two.picture_ttft_ms == pytest.approx(4000)
    assert one.streams_tok_s == pytest.approx(44 / 5, abs=0.1)
    assert ratio(one.tpot_ms, two.tpot_ms) == pytest.approx(0.5)


def test_what_is_left_out_is_not_asked() -> None:
    comparison = Comparison(picture=None, streams=1, rounds=1)
    names = []

    def measure(_: Target, load: Load) -> Figures:
        names.append(load.name)
        return answered(load, 1.0, 0.1)

    found = compare({"one": target(1)}, comparison, 1, measure, lambda _: None)["one"]
    assert set(names) == {"text"}
    assert found.picture_ttft_ms is None
    assert found.streams_tok_s is None
    assert ratio(found.streams_tok_s, 1.0) is None


def test_answers_in_one_piece_are_no_time_per_token() -> None:
    with pytest.raises(RequestFailed, match="two: every answer came in one piece"):
        compare({"two": target(2)}, Comparison(), 1, lambda _, load: answered(load, 1.0, 0.0), lambda _: None)


def test_a_failed_request_names_its_server() -> None:
    with pytest.raises(RequestFailed, match="two: a request of 'text' failed: no room"):
        compare(
            {"two": target(2)},
            Comparison(),
            1,
            lambda _, load: answered(load, 1.0, 0.1, "no room"),
            lambda _: None,
        )


@pytest.mark.parametrize("wrong", ["http://127.0.0.1:1", "=http://127.0.0.1:1", "vllm=127.0.0.1:1", "vllm"])
def test_servers_that_cannot_be(wrong: str) -> None:
    with pytest.raises(ConfigError, match="vllm=http"):
        read_target(wrong)


def test_two_servers(servers: tuple[Live, Live], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--input-tokens", "30", "--output-tokens", "7", "--picture", "40x30", "--streams", "2", "--rounds", "1"]
    assert run(["bench", "beside", f"qvl={servers[0].url}", f"echo={servers[1].url}", *flags]) == 0
    out, _ = capsys.readouterr()
    *table, last = out.splitlines()
    record = json.loads(last)
    assert record["comparison"] == dataclasses.asdict(Comparison(30, 7, (40, 30), 2, 1)) | {"picture": [40, 30]}
    for name in ("qvl", "echo"):
        assert all(value > 0 for value in record["measured"][name].values())
    assert table[0].split() == ["median", "of", "rounds", "qvl", "echo"]
    part = record["measured"]["qvl"]["streams_tok_s"] / record["measured"]["echo"]["streams_tok_s"]
    assert f"({part:.2f}x)" in table[4]
    assert "more is better" in table[4]


def test_keys_and_names_of_any_length(
    servers: tuple[Live, Live], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that wants a key is told by its name; a long name leaves the columns apart."""
    monkeypatch.delenv("QVL_API_KEY", raising=False)
    flags = ["--output-tokens", "7", "--picture", "none", "--streams", "1", "--rounds", "1"]
    long = "a-server-with-a-long-name"
    with live(EchoBackend(seconds_per_token=0.05), ServerOptions(api_keys=("secret",))) as guarded:
        named = [f"qvl={servers[0].url}", f"{long}={guarded.url}"]
        assert run(["bench", "beside", *named, *flags]) == 1
        assert f"{long}: GET /v1/models: HTTP 401: missing or wrong API key" in capsys.readouterr().err
        assert run(["bench", "beside", *named, *flags, "--api-key", "secret"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert table[0].split()[-2:] == ["qvl", long]
    assert "secret" not in last


def test_a_server_that_is_not_there_is_named(servers: tuple[Live, Live], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "beside", f"a={servers[0].url}", "gone=http://127.0.0.1:9"]) == 1
    assert "gone: no connection to 127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a"], ["a", "a"]])
def test_one_server_is_no_comparison(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "beside", *(f"{name}=http://127.0.0.1:9" for name in names)]) == 2
    assert "at least two servers" in capsys.readouterr().err
