"""Every failure is an OpenAI error body with the right status, and tells nothing that is not the caller's."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import requests

from qvl.backends.echo import EchoBackend
from qvl.errors import ConfigError, RequestFailed, Unavailable
from qvl.server.options import ServerOptions
from qvl.types import ChatRequest, Delta
from tests.server.live import Live, live, wait_until

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def error_of(reply: requests.Response) -> dict[str, Any]:
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    return dict(error)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"messages": x}', "byte 13"),
        (b'{"messages": [', "truncated"),
        (b"", "JSON"),
        (b"[1, 2]", "object"),
        (b"\xff\xfe", "JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', ""),
        (b"[" * 100_000, "JSON"),
        (b'{"temperature": NaN, "messages": []}', "JSON"),
        (json.dumps(HELLO).encode("utf-16"), "UTF-8"),
    ],
)
def test_bodies_that_are_no_json_object(server: Live, body: bytes, says: str) -> None:
    reply = requests.post(server.url + "/v1/chat/completions", data=body, timeout=120)
    assert reply.status_code == 400
    assert says in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"top_p": "high"}, "top_p"),
        ({"stop": ["x"] * 10**5}, "stop"),
        ({"tempretaure": 1}, "tempretaure"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "image_url"),
    ],
)
def test_fields_that_cannot_be(server: Live, change: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        reply = server.post("/v1/chat/completions", {**HELLO, **change, "stream": stream})
        assert reply.status_code == 400
        assert param in (error_of(reply)["param"] or "")


def test_the_model_must_be_the_served_one_when_it_is_named(server: Live) -> None:
    for name in (None, "", "echo"):
        assert server.post("/v1/chat/completions", {**HELLO, "model": name}).status_code == 200
    reply = server.post("/v1/chat/completions", {**HELLO, "model": "other"})
    assert reply.status_code == 404
    error = error_of(reply)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert server.get("/v1/models/other").status_code == 404


def test_aliases_and_the_name_in_the_answer() -> None:
    with live(EchoBackend(), ServerOptions(served_model_names=("qwen", "alias", "org/name"))) as running:
        assert [model["id"] for model in running.get("/v1/models").json()["data"]] == ["qwen", "alias", "org/name"]
        for path in ("org/name", "org%2Fname"):
            assert running.get(f"/v1/models/{path}").json()["id"] == "org/name"
        assert running.post("/v1/chat/completions", {**HELLO, "model": "alias"}).json()["model"] == "alias"
        assert running.post("/v1/chat/completions", HELLO).json()["model"] == "qwen"
        assert running.post("/v1/chat/completions", {**HELLO, "model": "echo"}).status_code == 404


def test_a_body_as_some_editors_write_it(server: Live) -> None:
    """With a byte order mark, which is no JSON, before it."""
    body = json.dumps(HELLO).encode("utf-8-sig")
    assert requests.post(server.url + "/v1/chat/completions", data=body, timeout=120).status_code == 200


def test_a_compressed_body_is_told_as_such(server: Live) -> None:
    for encoding, status in (("gzip", 400), ("br", 400), ("identity", 200)):
        headers = {"Content-Encoding": encoding}
        body = gzip.compress(b"{}") if status == 400 else json.dumps(HELLO).encode()
        reply = requests.post(server.url + "/v1/chat/completions", data=body, headers=headers, timeout=120)
        assert reply.status_code == status
        if status == 400:
            assert f"Content-Encoding: {encoding}" in error_of(reply)["message"]


def test_unknown_routes_and_wrong_methods(server: Live) -> None:
    error = error_of(server.post("/v1/embeddings", {}))
    assert error["code"] == "not_found"
    assert "did you mean" not in error["message"]
    reply = server.get("/v1/chat/completions")
    assert (reply.status_code, error_of(reply)["code"]) == (405, "method_not_allowed")
    assert reply.headers["allow"] == "POST"
    assert "POST" in error_of(reply)["message"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),  # a base URL without /v1
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/completion", None),
        ("/models", "/v1/models"),
        ("/v1/health", "/health"),
        ("/v1/responses", "/v1/chat/completions"),  # what other servers and other APIs of OpenAI's answer
        ("/v1/messages", "/v1/chat/completions"),
        ("/api/chat", "/v1/chat/completions"),
        ("/api/tags", "/v1/models"),
        ("/api/generate", "/v1/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),  # OpenRouter's base URL, and Open WebUI's
        ("/api/chat/completions", "/v1/chat/completions"),
        ("/api/v1/models", "/v1/models"),
        ("/v1/embeddings", None),
        ("/v1", None),
    ],
)
def test_the_route_that_was_meant(server: Live, path: str, meant: str | None) -> None:
    reply = server.get(path)
    message = error_of(reply)["message"]
    assert reply.status_code == 404
    assert (f"did you mean {meant}?" in message) if meant else ("did you mean" not in message)


def test_who_asks_as_ollama_is_asked_is_told(server: Live) -> None:
    for path in ("/api/show", "/api/version", "/api/embed"):
        assert "OpenAI's API, below /v1" in error_of(server.get(path))["message"]


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/ready", 200), ("/v1/models", 200), ("/metrics", 200), ("/nowhere", 404)]
)
def test_head_is_get_without_the_body(server: Live, path: str, status: int) -> None:
    """What small tools ask with that only want to know whether somebody is there."""
    with requests.Session() as session:
        reply = session.head(server.url + path, timeout=120)
        assert (reply.status_code, reply.content) == (status, b"")
        assert session.get(server.url + path, timeout=120).status_code == status  # the connection is as it should be
    assert requests.head(server.url + "/v1/chat/completions", timeout=120).status_code == 405


def test_too_long_a_prompt(server: Live) -> None:
    body = {"messages": [{"role": "user", "content": "x" * 5000}], "stream": True}
    reply = server.post("/v1/chat/completions", body)
    assert (reply.status_code, error_of(reply)["code"]) == (400, "context_length_exceeded")
    assert "this model's maximum context length is" in error_of(reply)["message"], "litellm knows it by these words"


def test_request_ids_are_echoed_when_they_are_harmless(server: Live) -> None:
    assert server.get("/health", headers={"X-Request-Id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    for bad in ("a b", "x" * 129, "<script>", "a;b"):
        given = server.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        assert given != bad
        assert len(given) == 32


class Failing(EchoBackend):
    """Fails after `after` deltas."""

    def __init__(self, error: Exception, after: int) -> None:
        super().__init__()
        self._error = error
        self._after = after

    async def chat(self, request: ChatRequest, request_id: str) -> AsyncGenerator[Delta, None]:
        count = 0
        async for delta in super().chat(request, request_id):
            if count == self._after:
                raise self._error
            count += 1
            yield delta


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_own_status(stream: bool) -> None:
    with live(Failing(Unavailable("the engine is restarting"), 0)) as running:
        reply = running.post("/v1/chat/completions", {**HELLO, "stream": stream})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert error_of(reply)["message"] == "the engine is restarting"


def test_a_failure_after_that_is_an_event_and_the_stream_ends() -> None:
    with live(Failing(RequestFailed("the logits are not numbers"), 2)) as running:
        reply = running.post("/v1/chat/completions", {**HELLO, "stream": True})
        events = reply.text.split("\n\n")
        assert running.get("/health").status_code == 200
    assert reply.status_code == 200
    assert [json.loads(event[6:])["choices"][0]["delta"]["content"] for event in events[:2]] == ["h", "e"]
    assert json.loads(events[2][6:])["error"]["code"] == "request_failed"
    assert events[3:] == ["data: [DONE]", ""]


@pytest.mark.parametrize("after", [0, 2])
def test_a_bug_is_told_by_its_request_id_only(after: int, caplog: pytest.LogCaptureFixture) -> None:
    with live(Failing(RuntimeError("/secret/path and the prompt"), after)) as running:
        for stream in (False, True):
            headers = {"X-Request-Id": f"case-{stream}"}
            reply = running.post("/v1/chat/completions", {**HELLO, "stream": stream}, headers=headers)
            assert reply.status_code == (200 if stream and after else 500)
            assert "secret" not in reply.text
            assert f"case-{stream}" in reply.text
            assert f"case-{stream}" in caplog.text
        assert running.get("/health").status_code == 200


class NeverStarts(EchoBackend):
    async def start(self) -> None:
        raise ConfigError("no such folder: /very/private")


def test_health_at_once_ready_only_when_it_is_true() -> None:
    with live(NeverStarts(), wait_ready=False) as running:
        assert running.get("/health").json() == {"status": "ok"}
        wait_until(lambda: "log says why" in running.get("/ready").text, "the failed start is not told")
        reply = running.get("/ready")
        assert reply.status_code == 503
        assert "private" not in reply.text


def test_docs_describe_the_bodies(server: Live) -> None:
    assert "swagger" in server.get("/docs").text.lower()
    document = server.get("/openapi.json").json()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    assert "max_tokens" in document["components"]["schemas"]["ChatBody"]["properties"]
    for example in body["examples"].values():
        value = {**example["value"], "stream": False, "stream_options": None}
        assert server.post("/v1/chat/completions", value).status_code == 200
    assert "#/$defs" not in json.dumps(document)
    refused = document["paths"]["/v1/chat/completions"]["post"]["responses"]["400"]["content"]["application/json"]
    shape = document["components"]["schemas"][refused["schema"]["$ref"].rpartition("/")[2]]
    told = server.post("/v1/chat/completions", {"messages": []})
    assert told.status_code == 400
    assert told.json()["error"].keys() == shape["properties"]["error"]["properties"].keys()
    assert "422" not in json.dumps(
        [list(operation["responses"]) for path in document["paths"].values() for operation in path.values()]
    )
