"""What an answer must look like, OpenAI's way (`response_format`) and vLLM's (`structured_outputs`, `guided_*`).

Knows the spellings and that a request has at most one. Does not know grammars: whether a schema can be kept to is found
out where the prompt is prepared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec
from pydantic import Field

from qvl.errors import InvalidRequest
from qvl.types import Constraint
from qvl.wire.fields import Fields


class JsonSchemaFields(Fields):
    """`strict: false` asks for an attempt only; the answer keeps to the schema all the same."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """`value` and `schema` are where TGI (and so huggingface_hub) and llama.cpp take the schema of a "json_object";
    llama.cpp takes `schema` as that of a "json_schema" too.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFields | None = None
    value: dict[str, Any] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def constraints(self) -> Iterator[Constraint]:
        param, beside = self._schema_beside()
        if self.json_schema is not None and self.type != "json_schema":
            raise InvalidRequest(f"'json_schema' is not for the type '{self.type}'", param="response_format")
        if self.type == "json_object":
            yield Constraint.json(beside or None, param=param)  # what any value would keep to is an object here
        elif self.type == "json_schema":
            if self.json_schema is not None:
                param, beside = "response_format.json_schema.schema", self.json_schema.schema_
            if beside is None:
                param = "response_format.json_schema" if self.json_schema is None else param
                raise InvalidRequest(f"'{param}' is missing", param=param)
            yield Constraint.json(beside, param=param)

    def _schema_beside(self) -> tuple[str, dict[str, Any] | None]:
        """The schema that stands beside the type, and the name of its field."""
        fields = {"value": self.value, "schema": self.schema_}
        given = [(f"response_format.{name}", schema) for name, schema in fields.items() if schema is not None]
        alone = self.type == "json_schema" and self.value is None and self.json_schema is None
        if given and (len(given) > 1 or not (alone or self.type == "json_object")):
            raise InvalidRequest(f"'{given[-1][0]}' is too much for the type '{self.type}'", param=given[-1][0])
        return given[0] if given else ("response_format", None)


class StructuredOutputs(Fields):
    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_fallback: bool | None = None  # another backend never stands in here
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    def constraints(self) -> Iterator[Constraint]:
        if self.json_object:
            yield Constraint.json(param="structured_outputs.json_object")
        yield from _constraints("structured_outputs.", self.json_, self.regex, self.choice, self.grammar)


class ConstraintFields(Fields):
    """The fields of a body of which at most one may ask for something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def constraint(self) -> Constraint | None:
        """Raises `InvalidRequest` for two that differ, and for one that says nothing."""
        found = list(self._constraints())
        for other in found[1:]:
            if other != found[0]:  # the same may be said twice, for old and for new versions of a server
                raise InvalidRequest(f"'{found[0].param}' and '{other.param}' exclude each other", param=other.param)
        return found[0] if found else None

    def _constraints(self) -> Iterator[Constraint]:
        if self.response_format is not None:
            yield from self.response_format.constraints()
        if self.structured_outputs is not None:
            yield from self.structured_outputs.constraints()
        yield from _constraints("guided_", self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)


def _constraints(
    prefix: str, schema: dict[str, Any] | str | None, regex: str | None, choice: list[str] | None, grammar: str | None
) -> Iterator[Constraint]:
    if schema is not None:
        yield Constraint.json(schema, param=f"{prefix}json")
    if regex is not None:
        yield Constraint.regex(regex, param=f"{prefix}regex")
    if choice is not None:
        yield Constraint.choice(choice, param=f"{prefix}choice")
    if grammar is not None:
        yield Constraint.grammar(grammar, param=f"{prefix}grammar")


def constraint_body(constraint: Constraint | None) -> Mapping[str, Any]:
    """The fields that ask for it; the JSON kinds in OpenAI's spelling, which every server knows."""
    if constraint is None:
        return {}
    if constraint.kind == "json_object":
        return {"response_format": {"type": "json_object"}}
    if constraint.kind == "json_schema":
        schema = {"name": "answer", "schema": _decoded(constraint), "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    value = _decoded(constraint) if constraint.kind == "choice" else constraint.text
    return {"structured_outputs": {constraint.kind: value}}


def _decoded(constraint: Constraint) -> Any:
    try:
        return msgspec.json.decode(constraint.text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"'{constraint.param}' is not JSON: {error}", param=constraint.param) from error
