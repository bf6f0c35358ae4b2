"""extract: always valid, whatever the server knows: kept to by the bundled checkpoint, asked and checked elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
from pydantic import BaseModel

from qvl.client import Client
from qvl.errors import BadAnswer, InvalidRequest, PromptTooLong
from qvl.tasks import Extract, Schema, each, extract
from qvl.tasks.keeping import REPAIRED
from qvl.types import TextPart
from tests.client.misbehaving import misbehaving, reply
from tests.tasks.scripted import Scripted

if TYPE_CHECKING:
    from qvl import LLM

SCHEMA = {
    "type": "object",
    "properties": {"room": {"type": "integer"}, "floor": {"enum": ["first", "second"]}},
    "required": ["room", "floor"],
    "additionalProperties": False,
}
GOOD, BAD = '{"room": 204, "floor": "second"}', '{"room": "204"}'
REFUSAL = InvalidRequest("unknown field 'response_format'", param="response_format")


class Room(BaseModel):
    room: int
    floor: str


def test_the_bundled_checkpoint_keeps_to_the_schema(demo: LLM, samples: Path) -> None:
    """It cannot fill in forms, but it cannot break one either."""
    for name in ("sample.png", "open.png"):
        jsonschema.validate(extract(samples / name, SCHEMA, model=demo), SCHEMA)


def test_the_schema_goes_both_ways(samples: Path) -> None:
    model = Scripted([GOOD])
    assert extract(samples / "sample.png", SCHEMA, model=model) == json.loads(GOOD)
    [(_, sampling)] = model.asked
    assert sampling.constraint == Schema(SCHEMA).constraint
    assert json.dumps(SCHEMA) in model.prompts()[0]


def test_a_pydantic_class_comes_back_as_itself(samples: Path) -> None:
    room = extract(samples / "sample.png", Room, model=Scripted([GOOD]))
    assert room == Room(room=204, floor="second")


def test_a_text(samples: Path) -> None:
    model = Scripted([GOOD])
    extract(TextPart("Room 204, second floor"), SCHEMA, model=model)
    assert "from the text below it" in model.prompts()[0] and model.prompts()[0].endswith("Room 204, second floor")


def test_a_server_that_does_not_know_schemas_is_asked_in_words_and_not_twice(samples: Path) -> None:
    model = Scripted([REFUSAL, f"Sure!\n```json\n{GOOD}\n```", GOOD])
    task = Extract(schema=Schema(SCHEMA))
    outcomes = list(each(task, samples / "sample.png", samples / "open.png", model=model, concurrency=1))
    assert [outcome.result and outcome.result.value for outcome in outcomes] == [json.loads(GOOD)] * 2
    assert [sampling.constraint is None for _, sampling in model.asked] == [False, True, True]
    for outcome in outcomes:
        assert outcome.result is not None and "did not take the schema (unknown field" in outcome.result.notes[0]


def test_one_round_of_repair(samples: Path) -> None:
    model = Scripted([BAD, GOOD])
    with pytest.warns(UserWarning, match=REPAIRED):
        assert extract(samples / "sample.png", SCHEMA, model=model) == json.loads(GOOD)
    turns, _ = model.asked[1]
    assert [turn.role for turn in turns] == ["user", "assistant", "user"]
    assert turns[1].parts == (TextPart(BAD),)
    assert "'floor' is a required property" in model.prompts()[1]


@pytest.mark.parametrize(
    "answer",
    [
        "Sure! Here is the JSON:\n\n```json\n{'room': 204, 'floor': 'second',}\n```\nLet me know!",
        "根据图片，提取的信息如下：\n{“room”：204，“floor”：“second”}",
        "```python\nprint('no')\n```\n\n{room: 204, floor: 'second'} // from the [first] line",
    ],
)
def test_what_models_write_is_read_as_meant_at_once(samples: Path, answer: str) -> None:
    model = Scripted([answer])
    with pytest.warns(UserWarning, match="as it was meant"):
        assert extract(samples / "sample.png", SCHEMA, model=model) == json.loads(GOOD)
    assert len(model.asked) == 1


@pytest.mark.parametrize("answers", [[BAD, BAD], ["prose", "more prose"], [REFUSAL, BAD, BAD], ["", "[]"]])
def test_what_does_not_keep_to_it_is_an_error(samples: Path, answers: list[str | Exception]) -> None:
    with pytest.raises(BadAnswer, match="does not keep to the schema"):
        extract(samples / "sample.png", SCHEMA, model=Scripted(list(answers)))


def test_a_cut_answer_is_told_as_such(samples: Path) -> None:
    with pytest.raises(BadAnswer, match="--max-tokens"):
        extract(samples / "sample.png", SCHEMA, model=Scripted([GOOD[:9]], "length"))


@pytest.mark.parametrize("error", [PromptTooLong(9000, 2048), InvalidRequest("no such model", param="model")])
def test_other_refusals_are_not_the_schemas(samples: Path, error: InvalidRequest) -> None:
    model = Scripted([error, GOOD])
    with pytest.raises(InvalidRequest, match=error.message[:10]):
        extract(samples / "sample.png", SCHEMA, model=model)
    assert len(model.asked) == 1


def test_over_http_a_server_that_says_400(samples: Path) -> None:
    """As the compatible mode of a large provider words it."""
    body = {"error": {"message": "'response_format.type' must be one of ['text', 'json_object']", "code": "invalid"}}
    chunk = {"choices": [{"index": 0, "delta": {"content": GOOD}, "finish_reason": "stop"}]}
    stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode()
    answers = [reply("404 Not Found"), reply("400 Bad Request", json.dumps(body).encode()), reply("200 OK", stream)]
    with misbehaving(answers) as server, Client(server.url, model="m", retries=0) as client:
        [outcome] = each(Extract(schema=Schema(SCHEMA)), samples / "open.png", model=client)
        assert outcome.result is not None and outcome.result.value == json.loads(GOOD)
        assert [b'"response_format"' in request for request in server.requests] == [False, True, False]
