"""A JSON schema that an answer must keep to, and the check that it does, made here whoever answered.

Knows schemas as a person writes them: a file, its text, a dict, a pydantic class, names of fields. Does not know
models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from qvl.errors import InvalidRequest
from qvl.types import Constraint

_KEYWORDS = ("type", "properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items", "required")
_TOLD = 3  # mistakes in one complaint
_PARAM = "schema"


class Schema:
    """A checked JSON schema. Nothing is ever fetched for it: a `$ref` points into the schema itself."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        if not isinstance(schema, Mapping) or not any(word in schema for word in _KEYWORDS):
            raise InvalidRequest(
                'this is no JSON schema: it should look like {"type": "object", "properties": {...}}', param=_PARAM
            )
        self.schema = dict(schema)
        kind = validator_for(self.schema, default=jsonschema.Draft202012Validator)
        try:
            kind.check_schema(self.schema)
        except (jsonschema.SchemaError, RecursionError, re.error) as error:
            reason = error.message if isinstance(error, jsonschema.SchemaError) else str(error)
            where = "/".join(map(str, error.absolute_path)) if isinstance(error, jsonschema.SchemaError) else ""
            raise InvalidRequest(
                f"the JSON schema is wrong{f' at {where}' if where else ''}: {reason}", param=_PARAM
            ) from error
        self._validator = kind(self.schema, registry=Registry())
        self.complaint(None)  # a reference that points nowhere is told before anything is asked

    @classmethod
    def read(cls, given: Any) -> Schema:
        """From a dict, a pydantic class, a path, or JSON text. Raises `InvalidRequest`."""
        if isinstance(given, cls):
            return given
        if hasattr(given, "model_json_schema"):
            return cls(given.model_json_schema())
        if isinstance(given, Path) or (isinstance(given, str) and not given.lstrip().startswith("{")):
            return cls.from_file(Path(given))
        return cls(_decoded(given, "the JSON schema") if isinstance(given, str) else given)

    @classmethod
    def from_file(cls, path: Path) -> Schema:
        try:
            text = path.expanduser().read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise InvalidRequest(f"cannot read the schema {path}: {reason}", param=_PARAM) from error
        return cls(_decoded(text, f"the schema {path}"))

    @classmethod
    def of_fields(cls, names: Iterable[str]) -> Schema:
        """An object with a text for each name, null where there is none."""
        named = [name for name in (name.strip() for name in names) if name]
        if not named:
            raise InvalidRequest("name at least one field", param="fields")
        fields = {name: {"type": ["string", "null"]} for name in named}
        return cls({"type": "object", "properties": fields, "required": named, "additionalProperties": False})

    @property
    def text(self) -> str:
        return json.dumps(self.schema, ensure_ascii=False)

    @property
    def constraint(self) -> Constraint:
        """What has a server choose only tokens that keep to the schema."""
        return Constraint.json(self.schema, param="response_format.json_schema.schema")

    def complaint(self, value: Any) -> str | None:
        """What is wrong with a value, None when it keeps to the schema. Raises `InvalidRequest` where the schema itself
        is at fault."""
        try:
            mistakes = sorted(self._validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
        except (Unresolvable, RecursionError, re.error) as error:
            reason = "it refers to itself without end" if isinstance(error, RecursionError) else str(error)
            raise InvalidRequest(f"the JSON schema cannot be used: {reason}", param=_PARAM) from error
        told = [f"{_place(mistake)}{mistake.message}" for mistake in mistakes[:_TOLD]]
        more = [f"and {len(mistakes) - _TOLD} more"] if len(mistakes) > _TOLD else []
        return "; ".join([*told, *more]) or None


def _place(mistake: jsonschema.ValidationError) -> str:
    path = "/".join(map(str, mistake.absolute_path))
    return f"{path}: " if path else ""


def _decoded(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{what} is not JSON: {error}", param=_PARAM) from error
