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

_ERROR_SCHEMA = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    "get": {"401": "The API key is missing or wrong"},
    "post": {
        "400": "Something in the request is wrong or not supported; `param` names the field",
        "401": "The API key is missing or wrong",
        "404": "The model is not served here",
        "413": "The body, a picture or a video is above its cap",
        "429": "The queue is full; `Retry-After` says when to come again",
        "500": "This request failed inside the server",
        "503": "The engine is starting, restarting or draining",
    },
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`, with the bodies' schemas; made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, schemas = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
        components = document.setdefault("components", {}).setdefault("schemas", {})
        components.update(schemas.get("$defs", {}))
        _tell_errors(document)
        app.openapi_schema = document
    return app.openapi_schema


def _tell_errors(document: dict[str, Any]) -> None:
    """FastAPI says 422 for what it would refuse; here every refusal is an OpenAI error body with one of these."""
    content = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    schemas = document["components"]["schemas"]
    schemas["Error"] = _ERROR_SCHEMA
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    document["paths"]["/ready"]["get"]["responses"]["503"] = {"description": "Not ready; `reason` says why"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"].pop("422", None)
            errors = {} if path in ("/health", "/ready") else dict(_ERRORS[method])
            if path == "/v1/models/{name}":
                errors["404"] = _ERRORS["post"]["404"]
            operation["responses"] |= {
                status: {"description": what, "content": content} for status, what in errors.items()
            }
