"""Request bodies: every accepted field acts, everything else is a 400 that names itself."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from qvl import wire
from qvl.errors import InvalidRequest
from qvl.types import ChatRequest, CompletionRequest, Message, PixelLimits, SamplingParams, TextPart
from qvl.wire.fields import NEUTRAL
from qvl.wire.structured import ConstraintFields

USER = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "m", "messages": [USER]}


def chat(**fields: Any) -> ChatRequest:
    return wire.parse_chat({**BODY, **fields}).request


def refused(body: Any, parse: Any = wire.parse_chat) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


def test_the_smallest_request() -> None:
    call = wire.parse_chat({"messages": [USER]})
    assert call.model is None
    assert call.request == ChatRequest((Message("user", (TextPart("hi"),)),))
    assert (call.stream, call.options) == (False, wire.Options())
    assert wire.parse_chat(json.dumps({"messages": [USER]}).encode()) == call


ACTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"max_completion_tokens": 7}, {"max_tokens": 7}),
    ({"max_tokens": 7, "max_completion_tokens": 7}, {"max_tokens": 7}),
    ({"min_tokens": 2}, {"min_tokens": 2}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
    ({"top_k": -1}, {"top_k": -1}),
    ({"min_p": 0.1}, {"min_p": 0.1}),
    ({"repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
    ({"presence_penalty": -1, "frequency_penalty": 0.5}, {"presence_penalty": -1.0, "frequency_penalty": 0.5}),
    ({"seed": -5}, {"seed": -5}),
    ({"stop": "x"}, {"stop": ("x",)}),
    ({"stop": ["x", "<|im_end|>"]}, {"stop": ("x", "<|im_end|>")}),
    ({"stop": []}, {}),
    ({"stop_token_ids": [1, 2]}, {"stop_token_ids": (1, 2)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
    ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ({"logit_bias": {"5": 1, "6": -2.5}}, {"logit_bias": {5: 1.0, 6: -2.5}}),
    ({"logprobs": True}, {"logprobs": 0}),
    ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
    ({"logprobs": False}, {}),
    ({"logprobs": False, "top_logprobs": 0}, {}),
    ({"n": 3}, {"n": 3}),
]


@pytest.mark.parametrize(("fields", "expected"), ACTS)
def test_sampling_fields_act(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert chat(**fields).sampling == SamplingParams(**expected)


def test_every_field_is_known_to_a_test() -> None:
    """A field added to the body without a test of its effect fails here."""
    tested = {name for fields, _ in ACTS for name in fields}
    elsewhere = {
        "model", "messages", "stream", "stream_options", "add_generation_prompt", "continue_final_message",
        "add_vision_id", "chat_template_kwargs", "mm_processor_kwargs", "cache_salt", "return_token_ids",
        "return_tokens_as_token_ids",
        "overflow",  # tests/server/test_overflow.py
        *ConstraintFields.model_fields,  # test_structured.py
    }  # fmt: skip
    assert set(wire.ChatBody.model_fields) == tested | elsewhere


def test_prompt_fields_act() -> None:
    assert not chat(add_generation_prompt=False).add_generation_prompt
    continued = chat(continue_final_message=True)
    assert (continued.continue_final_message, continued.add_generation_prompt) == (True, False)
    assert chat(add_vision_id=True).add_vision_id
    assert chat(chat_template_kwargs={"add_vision_id": True}).add_vision_id
    assert not chat(add_vision_id=False, chat_template_kwargs={"add_vision_id": True}).add_vision_id
    assert chat(chat_template_kwargs={"enable_thinking": False, "thinking": False}) == chat()
    assert chat(cache_salt="tenant").cache_salt == "tenant"
    limits = {"min_pixels": 3136, "max_pixels": 50_176, "fps": 1}
    assert chat(mm_processor_kwargs=limits).limits == PixelLimits(3136, 50_176, 1.0)
    size = {"shortest_edge": 3136, "longest_edge": 50_176}
    assert chat(mm_processor_kwargs={"size": size}).limits == PixelLimits(3136, 50_176)
    assert chat(mm_processor_kwargs={"size": size, "max_pixels": 784_000}).limits == PixelLimits(3136, 784_000)


def test_stream_fields_act() -> None:
    call = wire.parse_chat({**BODY, "stream": True, "stream_options": {"include_usage": True}})
    assert call.stream
    assert call.options == wire.Options(include_usage=True)
    both = {"include_usage": False, "continuous_usage_stats": True, "include_obfuscation": False, "unknown": None}
    call = wire.parse_chat({**BODY, "stream": True, "stream_options": both, "return_token_ids": True})
    assert call.options == wire.Options(include_usage=True, continuous_usage=True, token_ids=True)


@pytest.mark.parametrize("name", sorted({*wire.ChatBody.model_fields, *NEUTRAL} - {"messages"}))
def test_null_asks_for_nothing(name: str) -> None:
    assert wire.parse_chat({**BODY, name: None}).request == chat()


@pytest.mark.parametrize(("name", "neutral"), [(name, value) for name, values in NEUTRAL.items() for value in values])
def test_neutral_values_are_accepted(name: str, neutral: Any) -> None:
    assert chat(**{name: neutral}) == chat()


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_supported_is_named(name: str) -> None:
    error = refused({**BODY, name: {"a": ["value", "of no meaning"]}})
    assert error.param == name
    assert "not supported" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs.documents"),
        ({"enable_thinking": True}, "enable_thinking"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"length_penalty": True}, "length_penalty"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"best_of": 2}, "best_of"),
    ],
)
def test_what_asks_for_something_else_is_refused(fields: dict[str, Any], param: str) -> None:
    assert refused({**BODY, **fields}).param == param


def test_a_neutral_number_may_be_written_as_a_whole_one() -> None:
    assert chat(length_penalty=1, priority=0.0) == chat()


def test_tools_that_must_not_be_called() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert chat(tools=tools, tool_choice="none") == chat()
    assert refused({**BODY, "tools": tools, "tool_choice": "auto"}).param == "tools"


def test_what_is_not_supported_says_what_is() -> None:
    assert "'response_format'" in refused({**BODY, "tools": [{"type": "function"}]}).message
    assert "X-Request-Id" in refused({**BODY, "request_id": "mine"}).message


def test_labels_of_the_caller_are_ignored() -> None:
    assert chat(user="u", metadata={"a": "b"}, safety_identifier="s") == chat()
    assert chat(prompt_cache_key="k", prompt_cache_retention="24h") == chat()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": 5.0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 10**6}, "n"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"temperature": [1]}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("-inf")}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**18}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["x"] * 100_000}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x" * 5000]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": list(range(5000))}, "stop_token_ids"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"1": float("nan")}}, "logit_bias.1"),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"stream": "true"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"model": 5}, "model"),
        ({"cache_salt": "x" * 5000}, "cache_salt"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"mm_processor_kwargs": {"max_pixel": 5}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"size": 5}}, "mm_processor_kwargs.size"),
        ({"mm_processor_kwargs": {"size": {"height": 5}}}, "mm_processor_kwargs.size"),
        ({"mm_processor_kwargs": {"size": {"longest_edge": 0}}}, "mm_processor_kwargs.size.longest_edge"),
        ({"mm_processor_kwargs": {"max_pixels": 0}}, "mm_processor_kwargs.max_pixels"),
        ({"mm_processor_kwargs": {"max_pixels": 10**30}}, "mm_processor_kwargs.max_pixels"),
        ({"mm_processor_kwargs": {"fps": float("nan")}}, "mm_processor_kwargs.fps"),
        ({"mm_processor_kwargs": {"num_frames": 10**6}}, "mm_processor_kwargs.num_frames"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
    ],
)
def test_bad_values_name_their_field(fields: dict[str, Any], param: str) -> None:
    error = refused({**BODY, **fields})
    assert error.param == param
    assert param.split("[")[0].split(".")[0] in error.message
    assert len(error.message) < 400


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("top-p", "top_p"),
        ("stops", "stop"),
        ("input", "messages"),  # the word of OpenAI's other API; in letters alone it is closest to min_p
        ("prompt", "messages"),
        ("format", "response_format"),
        ("num_predict", "max_tokens"),
        ("response_schema", "response_format"),
    ],
)
def test_unknown_fields_get_a_suggestion(name: str, meant: str) -> None:
    error = refused({**BODY, name: 1})
    assert error.param == name
    assert f"did you mean '{meant}'?" in error.message


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"messages": [], "temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
)
def test_bodies_that_are_no_json_objects(raw: bytes) -> None:
    assert len(refused(raw).message) < 300


def test_errors_do_not_repeat_what_was_sent() -> None:
    secret = "my secret prompt"
    for body in ({**BODY, "temperature": secret}, {"messages": [{"role": "user", "content": {"a": secret}}]}):
        assert secret not in refused(body).message


# --------------------------------------------------------------------------------------------------------- completions


def completion(**fields: Any) -> wire.CompletionCall:
    return wire.parse_completion({"model": "m", **fields})


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
    ],
)
def test_prompts(prompt: Any, expected: list[Any]) -> None:
    assert [request.prompt for request in completion(prompt=prompt).requests] == expected


def test_completion_fields_act() -> None:
    call = completion(prompt="x", max_tokens=3, logprobs=2, n=2, cache_salt="s", stream=True)
    expected = SamplingParams(max_tokens=3, logprobs=2, n=2)
    assert call.requests == (CompletionRequest("x", expected, False, "s"),)
    assert call.stream
    assert completion(prompt="x", echo=True).requests[0].echo
    assert completion(prompt="x", suffix="").requests == completion(prompt="x").requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2**40]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": ["x"] * 40, "n": 2}, "prompt"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": 99}, "logprobs"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "logprobs"),
        ({"prompt": "x", "messages": [USER]}, "messages"),
        ({"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens"),
    ],
)
def test_bad_completions(fields: dict[str, Any], param: str) -> None:
    error = refused(fields, wire.parse_completion)
    assert error.param is not None
    assert error.param.split("[")[0] == param


# ------------------------------------------------------------------------------------------------- tokenize, detokenize


def test_tokenize_takes_a_prompt_or_messages() -> None:
    text = wire.parse_tokenize({"prompt": "x", "return_token_strs": True, "add_special_tokens": True})
    assert (text.request, text.return_token_strs) == (CompletionRequest("x"), True)
    talk = wire.parse_tokenize({"model": "m", "messages": [USER], "add_generation_prompt": False})
    assert talk.model == "m"
    assert talk.request == ChatRequest((Message("user", (TextPart("hi"),)),), add_generation_prompt=False)


@pytest.mark.parametrize(
    "body", [{}, {"prompt": "x", "messages": [USER]}, {"prompt": 5}, {"messages": []}, {"prompt": "x", "p": 1}]
)
def test_bad_tokenize(body: dict[str, Any]) -> None:
    refused(body, wire.parse_tokenize)


def test_detokenize() -> None:
    assert wire.parse_detokenize({"tokens": [1, 2]}).token_ids == (1, 2)
    for tokens in (None, "x", [-1], [1.0], [2**40], [[1]]):
        refused({"tokens": tokens}, wire.parse_detokenize)


def test_importing_wire_imports_no_torch() -> None:
    code = "import sys, qvl, qvl.wire, qvl.tokenizer; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
