"""The whole way: HTTP, intake, the engine process with a tiny random checkpoint, and back. One engine for all tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions
from tests.server import shapes
from tests.server.live import Live, live, wait_until
from tests.server.test_limits import dial, request_bytes

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def options(checkpoint: Path) -> EngineOptions:
    return EngineOptions(
        model=str(checkpoint),
        device="cpu",
        dtype="float32",
        max_model_len=1024,
        num_blocks=512,
        num_threads=1,
        allow_private_hosts=True,
        mm_processor_kwargs={"max_pixels": 200_704},
    )


@pytest.fixture(scope="module")
def real(options: EngineOptions) -> Iterator[Live]:
    with live(LocalBackend(options)) as running:
        yield running


@pytest.fixture(scope="module")
def bodies() -> Iterator[list[dict[str, Any]]]:
    with shapes.picture_host() as url:
        yield [
            {**shapes.text_only(), "temperature": 0},
            shapes.picture_by_url(url),
            shapes.picture_as_data_url(),
            shapes.two_pictures(),
            shapes.three_turns(),
        ]


def streamed(server: Live, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The joined text of a stream, and its usage."""
    text, usage = "", {}
    reply = server.post(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.status_code == 200, reply.text
    events = reply.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        chunk = json.loads(event.removeprefix("data: "))
        text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
        usage = chunk["usage"] or usage
    return text, usage


@pytest.mark.parametrize("number", range(5))
def test_the_shapes_of_the_world(real: Live, bodies: list[dict[str, Any]], number: int) -> None:
    body = bodies[number]
    reply = requests.post(
        real.url + CHAT, data=json.dumps(body), headers={"Content-Type": "application/json"}, timeout=120
    )
    assert reply.status_code == 200, reply.text
    answer = reply.json()
    text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    assert text
    counted = real.post("/tokenize", {"messages": body["messages"]}).json()["count"]
    assert usage["prompt_tokens"] == counted
    assert 0 < usage["completion_tokens"] <= body["max_tokens"]
    assert (answer["choices"][0]["finish_reason"] == "length") == (usage["completion_tokens"] == body["max_tokens"])
    again, its_usage = streamed(real, body)
    assert again == text
    assert (its_usage["prompt_tokens"], its_usage["completion_tokens"]) == (counted, usage["completion_tokens"])


def test_the_way_a_picture_comes_does_not_matter(real: Live) -> None:
    with shapes.picture_host() as url:
        by_url = streamed(real, shapes.picture_by_url(url))[0]
    inline = f"data:image/jpeg;base64,{shapes.encoded()}"
    assert streamed(real, shapes.picture_by_url(inline))[0] == by_url
    assert streamed(real, shapes.picture_as_data_url())[0] != by_url, "another picture gives another answer"


def test_many_streams_at_once_equal_one_by_one(real: Live, bodies: list[dict[str, Any]]) -> None:
    wanted = [streamed(real, body)[0] for body in bodies]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda n: streamed(real, bodies[n % 5])[0], range(32)))
    assert got == [wanted[n % 5] for n in range(32)]


def test_the_official_client_with_everything_on(real: Live) -> None:
    client = openai.OpenAI(base_url=real.url + "/v1", api_key="unused", max_retries=0)
    messages: Any = shapes.picture_as_data_url()["messages"]
    asked: dict[str, Any] = {"model": "", "messages": messages, "n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 8}
    first = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    second = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices], "a seed repeats"
    assert texts[0] != texts[1], "answers of one request differ"
    assert first.usage is not None
    assert (
        sum(len(choice.logprobs.content or ()) for choice in first.choices if choice.logprobs)
        == first.usage.completion_tokens
    )
    assert all(
        len(one.top_logprobs) == 2 for one in (first.choices[0].logprobs.content or ()) if first.choices[0].logprobs
    )


def test_a_stop_string_cuts_text_and_work(real: Live) -> None:
    body = {**shapes.text_only(), "temperature": 0, "max_tokens": 200, "ignore_eos": True}
    whole = streamed(real, body)[0]
    word = whole[len(whole) // 3 :][:3]
    reply = real.post(CHAT, {**body, "stop": [word]}).json()
    assert reply["choices"][0]["message"]["content"] == whole[: whole.index(word)]
    assert (reply["choices"][0]["finish_reason"], reply["choices"][0]["stop_reason"]) == ("stop", word)
    real.wait_metric("qvl_engine_running", 0)


def test_errors_name_what_to_do(real: Live) -> None:
    part = shapes.two_pictures()["messages"][0]["content"][0]
    many = real.post(CHAT, {"messages": [{"role": "user", "content": [part] * 5}]})
    assert (many.status_code, many.json()["error"]["code"]) == (400, "too_many_media")
    assert "--limit-mm-per-prompt image=5" in many.json()["error"]["message"]
    long = real.post(
        CHAT, {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "word " * 3000}]}]}
    )
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    broken = shapes.picture_by_url("data:image/png;base64,AAAA")
    for stream in (False, True):
        reply = real.post(CHAT, {**broken, "stream": stream})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_media")


def test_metrics_of_every_stage(real: Live) -> None:
    with shapes.picture_host() as url:
        assert real.post(CHAT, shapes.picture_by_url(url)).status_code == 200
    for stage in ("fetch", "decode", "resize", "hash", "share"):
        assert real.metric(f'qvl_media_stage_seconds_count{{kind="image",stage="{stage}"}}') >= 1
    before = real.metric("qvl_engine_encoder_hits_total"), real.metric("qvl_generation_tokens_total")
    usage = real.post(CHAT, {**shapes.picture_as_data_url(), "cache_salt": "x"}).json()["usage"]
    assert real.metric("qvl_engine_encoder_hits_total") > before[0]
    assert real.metric("qvl_generation_tokens_total") == before[1] + usage["completion_tokens"]
    assert real.metric("qvl_engine_encode_seconds_total") > 0
    assert real.metric("qvl_time_to_first_token_seconds_count") > 0
    assert real.metric("qvl_ready") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks(real: Live, stream: bool) -> None:
    real.wait_metric("qvl_engine_running", 0)
    idle = real.metric("qvl_engine_kv_used_fraction")
    body = {**shapes.text_only(), "max_tokens": 900, "ignore_eos": True, "stream": stream}
    aborted = real.metric("qvl_engine_aborted_total")
    with dial(real) as sock:
        sock.sendall(request_bytes(body))
        real.wait_metric("qvl_engine_running", 1)
        assert real.metric("qvl_engine_kv_used_fraction") > idle
    real.wait_metric("qvl_engine_running", 0)
    assert real.metric("qvl_engine_kv_used_fraction") == idle
    assert real.metric("qvl_engine_aborted_total") == aborted + 1


def test_health_answers_while_pictures_are_on_their_way(real: Live) -> None:
    """Hosts that accept and say nothing hold the threads for pictures; neither /health nor text waits for them.

    Their connections break when `mute` is closed, which ends the requests.
    """
    with socket.socket() as mute, ThreadPoolExecutor(40) as pool:
        mute.bind(("127.0.0.1", 0))
        mute.listen(100)
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/never.jpg"
        asked = [pool.submit(real.post, CHAT, shapes.picture_by_url(url)) for _ in range(40)]
        real.wait_metric("qvl_requests_in_flight", 40)
        assert real.get("/health").status_code == 200
        assert real.post(CHAT, {**shapes.text_only(), "max_tokens": 2}).status_code == 200
        mute.close()
        assert {one.result().status_code for one in asked} == {400}
    real.wait_metric("qvl_requests_in_flight", 0)


def test_a_killed_engine_is_told_and_replaced(real: Live) -> None:
    backend = real.service.backend
    assert isinstance(backend, LocalBackend)
    old = backend.engine_pid
    assert old is not None
    body = {**shapes.text_only(), "max_tokens": 900, "ignore_eos": True, "stream": True}
    with requests.post(real.url + CHAT, json=body, stream=True, timeout=120) as reply:
        lines = reply.iter_lines()
        next(lines)
        os.kill(old, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert rest[-1] == b"data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "engine_unavailable"
    refused = real.post(CHAT, shapes.text_only())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert real.get("/ready").status_code == 503
    assert real.get("/health").status_code == 200
    wait_until(lambda: real.get("/ready").status_code == 200, "no new engine came up")
    assert real.post(CHAT, shapes.picture_as_data_url()).status_code == 200
    assert real.metric("qvl_engine_restarts_total") == 1


def test_the_http_process_never_imports_torch(options: EngineOptions) -> None:
    code = """
import sys, threading
from qvl.backends.local import LocalBackend
from qvl.engine.options import EngineOptions
from tests.server import shapes
from tests.server.live import live
engine = (sys.executable, "-m", "tests.engine.fake_engine", "fast")  # what computes lives elsewhere anyway
with live(LocalBackend(EngineOptions.from_json(sys.argv[1]), command=engine)) as server:
    reply = server.post("/v1/chat/completions", shapes.two_pictures())
    assert reply.status_code == 200, reply.text
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "av"}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, options.to_json()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
