"""Every spelling of what an answer must look like, one constraint at most, and back again."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pydantic
import pytest

from qvl import wire
from qvl.errors import InvalidRequest
from qvl.types import MAX_CONSTRAINT_CHARS, Constraint

BODY = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["b"]}


def constraint(**fields: Any) -> Constraint | None:
    asked = wire.parse_chat({**BODY, **fields}).request.sampling.constraint
    plain = wire.parse_completion({"prompt": "hi", **fields}).requests[0].sampling.constraint
    assert plain == asked, "both routes read the same"
    return asked


def test_openai_spellings() -> None:
    assert constraint(response_format={"type": "text"}) is None
    assert constraint(response_format=None) is None
    assert constraint(response_format={"type": "json_object"}) == Constraint.json()
    described = {"name": "answer", "description": "d", "strict": True, "schema": SCHEMA}
    found = constraint(response_format={"type": "json_schema", "json_schema": described})
    assert found == Constraint.json(SCHEMA)
    assert found is not None
    assert found.param == "response_format.json_schema.schema"
    assert list(json.loads(found.text)["properties"]) == ["b", "a"], "properties keep their order: answers follow it"


@pytest.mark.parametrize("name", ["value", "schema"])
def test_a_schema_beside_json_object(name: str) -> None:
    """How huggingface_hub writes every schema (for TGI), and how llama.cpp's server takes one."""
    found = constraint(response_format={"type": "json_object", name: SCHEMA})
    assert found == Constraint.json(SCHEMA)
    assert found is not None
    assert found.param == f"response_format.{name}"
    assert constraint(response_format={"type": "json_object", name: {}}) == Constraint.json(), "still an object"


def test_a_schema_beside_json_schema() -> None:
    """llama.cpp's other way; `value` there would hold more than the schema."""
    found = constraint(response_format={"type": "json_schema", "schema": SCHEMA})
    assert found == Constraint.json(SCHEMA)
    assert found is not None
    assert found.param == "response_format.schema"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("json", SCHEMA, Constraint.json(SCHEMA)),
        ("json", json.dumps(SCHEMA), Constraint.json(SCHEMA)),
        ("regex", "[ab]+", Constraint.regex("[ab]+")),
        ("grammar", 'start: "x"', Constraint.grammar('start: "x"')),
        ("choice", ["yes", "日本"], Constraint.choice(["yes", "日本"])),
    ],
)
def test_vllm_spellings(name: str, value: Any, expected: Constraint) -> None:
    new, old = constraint(structured_outputs={name: value}), constraint(**{f"guided_{name}": value})
    assert new == old == expected
    assert new is not None
    assert old is not None
    assert (new.param, old.param) == (f"structured_outputs.{name}", f"guided_{name}")


def test_the_same_may_be_asked_for_twice() -> None:
    """guidance writes a grammar in the words of new and of old versions of vLLM at once."""
    twice = {"structured_outputs": {"grammar": 'start: "x"'}, "guided_grammar": 'start: "x"'}
    assert constraint(**twice) == Constraint.grammar('start: "x"')


def test_asking_for_nothing() -> None:
    assert constraint(structured_outputs={}) is None
    assert constraint(structured_outputs={"json_object": False}) is None
    switches = {"disable_fallback": True, "disable_any_whitespace": False, "disable_additional_properties": False}
    unset = {"regex": None, "whitespace_pattern": None, "structural_tag": None}
    assert constraint(structured_outputs={**switches, **unset}) is None
    assert constraint(response_format={"type": "json_object", "json_schema": None, "schema": None}) == Constraint.json()
    assert constraint(structured_outputs={"json_object": True}) == Constraint.json()
    assert constraint(guided_json=SCHEMA, guided_decoding_backend="guidance") == Constraint.json(SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
        (
            {"structured_outputs": {"json": {}, "disable_any_whitespace": True}},
            "structured_outputs.disable_any_whitespace",
        ),
        ({"response_format": {"type": "json_object", "schema": {}, "value": {}}}, "response_format.schema"),
        ({"response_format": {"type": "text", "value": {}}}, "response_format.value"),
        ({"response_format": {"type": "json_schema", "value": {}}}, "response_format.value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "schema": {}}},
            "response_format.schema",
        ),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": "yes"}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_regex": "a" * (MAX_CONSTRAINT_CHARS + 1)}, "guided_regex"),
        ({"guided_json": {"enum": ["x" * 1_000_000]}}, "guided_json"),
        ({"guided_json": {"a": 1}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_choice": ["a"]}, "guided_choice"),
    ],
)
def test_what_makes_no_sense_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wire.parse_chat({**BODY, **fields})
    assert caught.value.param == param


@pytest.mark.parametrize(
    "wanted",
    [
        None,
        Constraint.json(),
        Constraint.json(SCHEMA),
        Constraint.regex("a+"),
        Constraint.grammar('start: "x"'),
        Constraint.choice(["a", "b"]),
    ],
)
def test_a_request_written_and_read_again(wanted: Constraint | None) -> None:
    request = wire.parse_chat(BODY).request
    sampling = dataclasses.replace(request.sampling, constraint=wanted)
    chat = dataclasses.replace(request, sampling=sampling)
    assert wire.parse_chat(wire.chat_body(chat, "m", False)).request == chat


def test_a_program_may_give_a_pydantic_class() -> None:
    class Point(pydantic.BaseModel):
        x: int
        y: int

    assert Constraint.json(Point) == Constraint.json(Point.model_json_schema())


@pytest.mark.parametrize("schema", [{"a": {1, 2}}, {"a": object()}])
def test_a_schema_is_plain_json(schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="plain JSON"):
        Constraint.json(schema)


def test_nesting_beyond_all_bounds() -> None:
    nested: Any = {}
    for _ in range(100_000):
        nested = {"items": nested}
    with pytest.raises(InvalidRequest):
        Constraint.json(nested)
