"""The request shapes people send, over a real socket, with plain `requests` and with the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
import requests

from tests.server import shapes
from tests.server.live import Live

HEADERS = {"Content-Type": "application/json"}

# What EchoBackend answers: the last user text, cut at max_tokens characters, and how many pictures it was shown.
CASES = [
    (shapes.text_only(), "Tell me a story about a lighthouse."),
    (shapes.picture_by_url("http://192.0.2.1/never-fetched-by-echo.jpg"), "What is in the picture? [1 image]"),
    (shapes.picture_as_data_url(), "What is in the picture? [1 image]"),
    (shapes.two_pictures(), "What differs between the two? [2 images]"),
    (shapes.three_turns(), "Are you sure? [1 image]"),
]


@pytest.mark.parametrize(("body", "text"), CASES)
def test_a_shape_as_it_stands(server: Live, body: dict[str, Any], text: str) -> None:
    reply = requests.post(server.url + "/v1/chat/completions", data=json.dumps(body), headers=HEADERS, timeout=120)
    assert reply.status_code == 200
    answer = reply.json()
    expected = text[: body["max_tokens"]]
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected}
    assert answer["choices"][0]["finish_reason"] == ("length" if len(text) > body["max_tokens"] else "stop")
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(expected)
    assert usage["total_tokens"] == usage["prompt_tokens"] + len(expected)
    assert (answer["object"], answer["model"]) == ("chat.completion", "echo")


@pytest.mark.parametrize(("body", "text"), CASES)
def test_streamed_is_unstreamed(server: Live, body: dict[str, Any], text: str) -> None:
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    lines = server.post("/v1/chat/completions", body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content") or "" for choice in deltas) == text[: body["max_tokens"]]
    assert [choice["finish_reason"] for choice in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert chunks[-1]["choices"] == []
    assert (
        chunks[-1]["usage"]
        == server.post("/v1/chat/completions", {**body, "stream": False, "stream_options": None}).json()["usage"]
    )


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}]
)
def test_any_content_type_will_do(server: Live, headers: dict[str, str]) -> None:
    data = json.dumps(shapes.text_only()).encode()
    reply = requests.post(server.url + "/v1/chat/completions", data=data, headers=headers, timeout=120)
    assert reply.status_code == 200


def test_the_official_client(server: Live) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"
    messages: Any = shapes.two_pictures()["messages"]
    whole = client.chat.completions.create(model="echo", messages=messages, max_tokens=100, n=2)
    assert [choice.message.content for choice in whole.choices] == ["What differs between the two? [2 images]"] * 2
    stream = client.chat.completions.create(
        model="echo", messages=messages, stream=True, stream_options={"include_usage": True}
    )
    text, usage = "", None
    for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == len(text)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="echo", messages=messages, temperature=-1)
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=messages)


def test_plain_completions(server: Live) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
    answer = client.completions.create(model="echo", prompt=["one", "two"], n=2, stop="o")
    assert [choice.text for choice in answer.choices] == ["", "", "tw", "tw"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 6
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(model="echo", prompt=["one", "two"], n=2, stop="o", stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "", 1: "", 2: "tw", 3: "tw"}


def test_logprobs_name_the_token(server: Live) -> None:
    body = {"messages": [{"role": "user", "content": "é!"}], "logprobs": True, "top_logprobs": 1}
    (first, second) = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["bytes"], second["token"]) == ("é", [0xC3, 0xA9], "!")


def test_tokens_there_and_back(server: Live) -> None:
    counted = server.post("/tokenize", {"prompt": "añb", "return_token_strs": True}).json()
    assert (counted["count"], counted["token_strs"]) == (3, ["a", "ñ", "b"])
    assert server.post("/detokenize", {"tokens": counted["tokens"]}).json() == {"prompt": "añb"}
    reply = server.post("/detokenize", {"tokens": [0xD800]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tokens")
