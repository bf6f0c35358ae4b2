"""Structured output over HTTP, by the official client and by hand: a random model whose answers always validate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from qvl.backends.local import LocalBackend
from qvl.client import Client
from qvl.engine.options import EngineOptions
from qvl.types import Constraint, SamplingParams
from tests.server.live import Live, live

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"total": {"type": "integer", "minimum": 0, "maximum": 999}, "paid": {"type": "boolean"}},
    "required": ["total", "paid"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def real(checkpoint: Path) -> Iterator[Live]:
    options = EngineOptions(
        model=str(checkpoint), device="cpu", dtype="float32", max_model_len=1024, num_blocks=512, num_threads=1
    )
    with live(LocalBackend(options)) as running:
        yield running


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Say something."}]
    return {"messages": messages, "temperature": 1.0, "seed": 1, "max_tokens": 300, **fields}


def text(server: Live, **fields: Any) -> str:
    reply = server.post(CHAT, body(**fields))
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def streamed(server: Live, **fields: Any) -> str:
    reply = server.post(CHAT, body(**fields, stream=True))
    assert reply.status_code == 200, reply.text
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


SPELLINGS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "bill", "schema": SCHEMA, "strict": True}}},
    {"structured_outputs": {"json": SCHEMA}},
    {"guided_json": json.dumps(SCHEMA)},
]


@pytest.mark.parametrize("fields", SPELLINGS)
def test_a_schema_in_every_spelling(real: Live, fields: dict[str, Any]) -> None:
    answer = text(real, **fields)
    jsonschema.validate(json.loads(answer), SCHEMA)
    assert streamed(real, **fields) == answer
    plain = real.post("/v1/completions", {"prompt": "Say: ", "max_tokens": 300, "temperature": 1.0, **fields})
    jsonschema.validate(json.loads(plain.json()["choices"][0]["text"]), SCHEMA)


def test_the_other_kinds(real: Live) -> None:
    assert re.fullmatch("[ab]{5}", text(real, guided_regex="[ab]{5}"))
    assert text(real, structured_outputs={"choice": ["yes", "no"]}) in ("yes", "no")
    assert re.fullmatch(r"x[0-9]{2}y", text(real, guided_grammar='start: "x" /[0-9]{2}/ "y"'))
    assert text(real, response_format={"type": "json_object"}).startswith("{")


class Bill(pydantic.BaseModel):
    total: int
    currency: Literal["EUR", "USD"]
    note: str | None = pydantic.Field(max_length=10)


def test_the_official_client_parses(real: Live) -> None:
    client = openai.OpenAI(base_url=real.url + "/v1", api_key="unused", max_retries=0)
    asked: dict[str, Any] = {"model": "", "messages": body()["messages"], "max_tokens": 300, "temperature": 1.0}
    parsed = 0
    for seed in range(4):
        try:
            completion = client.chat.completions.parse(**asked, seed=seed, response_format=Bill)
        except openai.LengthFinishReasonError:  # digits without end: the schema sets no bound
            continue
        bill = completion.choices[0].message.parsed
        assert isinstance(bill, Bill)
        parsed += 1
    assert parsed
    with client.chat.completions.stream(**asked, seed=0, response_format=Bill) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Bill)


def test_our_own_client(real: Live) -> None:
    sampling = SamplingParams(max_tokens=300, temperature=1.0, constraint=Constraint.json(SCHEMA))
    with Client(real.url) as client:
        jsonschema.validate(json.loads(client.ask("Say something.", sampling=sampling)), SCHEMA)
        sampling = SamplingParams(max_tokens=300, constraint=Constraint.choice(["a", "b"]))
        assert client.ask("Say something.", sampling=sampling) in ("a", "b")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_json": {"type": "strin"}}, "guided_json"),
        ({"structured_outputs": {"grammar": "start: missing"}}, "structured_outputs.grammar"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": {"enum": ["x" * 1_000_000]}}, "guided_json"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_kept_to_is_a_400(real: Live, fields: dict[str, Any], param: str, stream: bool) -> None:
    reply = real.post(CHAT, body(**fields, stream=stream))
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert text(real, guided_choice=["still here"]) == "still here"


def test_many_at_once_with_and_without(real: Live) -> None:
    asked: list[dict[str, Any]] = [{"seed": n} for n in range(4)] + [{"seed": n, **SPELLINGS[0]} for n in range(4)]
    asked += [{"seed": n, "guided_choice": [f"only {n}"]} for n in range(4)]
    asked = [{"max_tokens": 60, **fields} for fields in asked]
    alone = [text(real, **fields) for fields in asked]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(lambda fields: streamed(real, **fields), asked)) == alone
    assert alone[-4:] == [f"only {n}" for n in range(4)]


def test_health_answers_while_a_hostile_one_is_tried(real: Live) -> None:
    with ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(real.post, CHAT, body(guided_regex="a?" * 30_000))
        answers = 0
        while not hostile.done():
            assert real.get("/health").status_code == 200
            assert real.post(CHAT, body(max_tokens=1)).status_code == 200
            answers += 1
        assert answers > 3
        assert (hostile.result().status_code, hostile.result().json()["error"]["param"]) == (400, "guided_regex")
