"""Schemas: as people write them, checked; and values checked against them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qvl.errors import InvalidRequest
from qvl.tasks.schema import Schema

INVOICE = {
    "type": "object",
    "properties": {"number": {"type": "string"}, "total": {"type": "number", "minimum": 0}},
    "required": ["number", "total"],
    "additionalProperties": False,
}


class Invoice(BaseModel):
    number: str
    total: float


def test_every_way_to_give_one(tmp_path: Path) -> None:
    path = tmp_path / "invoice.json"
    path.write_text("\ufeff" + json.dumps(INVOICE), encoding="utf-8")
    for given in (INVOICE, json.dumps(INVOICE), path, str(path), Schema(INVOICE)):
        assert Schema.read(given).schema == INVOICE
    assert Schema.read(Invoice).complaint({"number": "7", "total": 1.5}) is None
    fields = Schema.of_fields([" date", "total ", ""])
    assert fields.complaint({"date": "1 May", "total": None}) is None
    assert fields.complaint({"date": "1 May"}) is not None


@pytest.mark.parametrize(
    "value, says",
    [
        ({"number": "7", "total": 3}, None),
        ({"number": 7, "total": 3}, "number: 7 is not of type 'string'"),
        ({"number": "7"}, "'total' is a required property"),
        ({"number": "7", "total": -1, "x": 0}, "total: -1 is less than the minimum"),
        ([], "[] is not of type 'object'"),
    ],
)
def test_what_is_wrong_with_a_value(value: Any, says: str | None) -> None:
    told = Schema(INVOICE).complaint(value)
    assert (told is None) if says is None else (told is not None and says in told)


def test_only_the_first_mistakes_are_told() -> None:
    schema = Schema({"type": "array", "items": {"type": "string"}})
    told = schema.complaint(list(range(10)))
    assert told is not None
    assert told.count("is not of type") == 3 and told.endswith("and 7 more")


@pytest.mark.parametrize(
    "given, says",
    [
        ('{"number": "string"}', "no JSON schema"),
        ("{broken", "not JSON"),
        ("nowhere.json", "cannot read the schema"),
        ({"type": "objekt"}, "wrong at type: 'objekt'"),
        ({"type": "string", "pattern": "("}, "JSON schema"),
        ({"$ref": "#/$defs/missing"}, "cannot be used"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "cannot be used"),
        ({"$ref": "#"}, "without end"),
        ([1], "no JSON schema"),
    ],
)
def test_schemas_that_are_none(given: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as told:
        Schema.read(given)
    assert told.value.exit_code == 2
    assert "\n" not in told.value.message
