"""Bodies as programs of others send them (docs/clients.md says which): each must be read. A picture is shortened."""

from __future__ import annotations

from typing import Any

import pytest

from qvl import wire
from qvl.types import MediaPart, TextPart

URL = "data:image/png;base64,AAAA"
PICTURE = {"type": "image_url", "image_url": {"url": URL}}
TEXT = {"type": "text", "text": "Read the text."}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "L", "schema": SCHEMA, "strict": True}}

BODIES: dict[str, dict[str, Any]] = {
    "AutoGen": {
        "stream": False,
        "max_tokens": 120,
        "messages": [
            {"role": "system", "content": "x"},
            {
                "role": "user",
                "name": "user",
                "content": [TEXT, {**PICTURE, "image_url": {"url": URL, "detail": "auto"}}],
            },
        ],
        "response_format": FORMAT,
    },
    "LangChain": {
        "messages": [{"role": "user", "content": [PICTURE, TEXT]}, {"role": "assistant", "content": "x", "name": "al"}],
        "max_completion_tokens": 300,
        "service_tier": "auto",
        "logit_bias": {"70": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "LangChain, tools that must not be called": {
        "messages": [{"role": "user", "content": [PICTURE, TEXT]}],
        "tools": [{"type": "function", "function": {"name": "L", "parameters": SCHEMA}}],
        "tool_choice": "none",
    },
    "litellm, an answer sent back": {
        "messages": [
            {"role": "user", "content": [PICTURE, TEXT]},
            {"role": "assistant", "content": "x", "provider_specific_fields": {"refusal": None}},
            {"role": "user", "content": "more"},
        ],
        "n": 1,
        "top_k": 4,
    },
    "openai, an answer sent back": {
        "messages": [
            {"role": "user", "content": [PICTURE, TEXT]},
            {
                "content": "x",
                "refusal": None,
                "role": "assistant",
                "annotations": None,
                "audio": None,
                "function_call": None,
                "tool_calls": None,
            },
            {"role": "user", "content": "more"},
        ],
        "store": False,
        "prompt_cache_key": "k",
        "prompt_cache_retention": "in-memory",
        "verbosity": "medium",
    },
    "AG2": {
        "stream": True,
        "messages": [{"content": "", "role": "system"}, {"role": "user", "content": [TEXT, PICTURE]}],
        "stream_options": {"include_usage": True},
    },
    "AI SDK": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "schema": {"$schema": "http://json-schema.org/draft-07/schema#", **SCHEMA},
                "strict": True,
                "name": "response",
            },
        },
        "messages": [{"role": "user", "content": [PICTURE, TEXT]}],
    },
    "huggingface_hub": {
        "messages": [
            {"role": "user", "content": [PICTURE, TEXT]},
            {"role": "assistant", "content": "x", "reasoning": None, "tool_call_id": None, "tool_calls": None},
        ],
        "response_format": {"type": "json_object", "value": SCHEMA},
    },
    "Outlines": {"messages": [{"role": "user", "content": [TEXT, PICTURE]}], "structured_outputs": {"json": SCHEMA}},
    "Open WebUI": {
        "messages": [{"role": "user", "content": [TEXT, PICTURE]}],
        "max_completion_tokens": 1000,
        "metadata": {"task": "title_generation"},
    },
    "what vLLM's pages show": {
        "messages": [{"role": "user", "content": [TEXT, {**PICTURE, "uuid": "cat-1"}]}],
        "chat_template_kwargs": {"enable_thinking": False},
        "mm_processor_kwargs": {"size": {"shortest_edge": 784, "longest_edge": 100_352}},
        "top_k": 20,
        "echo": False,
        "priority": 0,
        "length_penalty": 1,
    },
}


@pytest.mark.parametrize("program", BODIES)
def test_it_is_read(program: str) -> None:
    messages = wire.parse_chat(BODIES[program]).request.messages
    assert len(messages) == len(BODIES[program]["messages"])
    parts = [part for message in messages for part in message.parts]
    assert TextPart("Read the text.") in parts
    assert MediaPart("image", URL) in parts
