"""What /docs says about request bodies: schemas made from `wire`'s models, and examples that work as they stand.

Bodies are read raw and parsed by `wire` (any content type is fine), so FastAPI does not see them by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qvl import wire

_MODELS: tuple[type[BaseModel], ...] = (
    wire.ChatBody,
    wire.CompletionBody,
    wire.TokenizeTextBody,
    wire.TokenizeChatBody,
    wire.DetokenizeBody,
)
_REF = "#/components/schemas/{model}"
# A red disc on white, 56 x 56.
_PICTURE = {
    "url": "data:image/png;base64,"
    "iVBORw0KGgoAAAANSUhEUgAAADgAAAA4AQMAAACSSKldAAAABlBMVEX/////AADrWueTAAAAcElEQVR42rXQuw2DUBBE0cM+"
    "AjLTAS7FLbgDd0JrlEIJhC9AXgf+QIDkiEmu5kob7HB+xjdKzuCSlaDXEjwUChPNFJ+b0OAmBK4236Lf9S87dAf+HyvqgV+x"
    "7PoTs5CYfh5jJhhyJVis27+FdD9v2xfPUBhN8wZ38QAAAABJRU5ErkJggg=="
}


def _user(*parts: Mapping[str, Any] | str) -> dict[str, Any]:
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": texts}


def _body(examples: Mapping[str, Any], *models: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of a JSON body that is one of `models`."""
    refs = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    named = {name: {"summary": name, "value": value} for name, value in examples.items()}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}}


CHAT = _body(
    {
        "text": {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32, "temperature": 0},
        "one picture": {
            "messages": [_user({"type": "image_url", "image_url": _PICTURE}, "What is this?")],
            "max_tokens": 64,
        },
        "streamed, with token counts": {
            "messages": [{"role": "user", "content": "Hello!"}],
            "max_tokens": 32,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    },
    wire.ChatBody,
)
COMPLETION = _body({"text": {"prompt": "Once upon a time", "max_tokens": 16}}, wire.CompletionBody)
TOKENIZE = _body(
    {
        "a text": {"prompt": "Hello!"},
        "a conversation": {"messages": [{"role": "user", "content": "Hello!"}]},
    },
    wire.TokenizeTextBody,
    wire.TokenizeChatBody,
)
DETOKENIZE = _body({"tokens": {"tokens": [72, 105]}}, wire.DetokenizeBody)


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`, with the bodies' schemas; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, schemas = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(schemas.get("$defs", {}))
        app.openapi_schema = document
    return app.openapi_schema
