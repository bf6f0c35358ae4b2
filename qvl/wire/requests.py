"""Request bodies in OpenAI's shapes become requests in `qvl.types`.

Every accepted field acts; every other one is answered with an `InvalidRequest` that names it. Does not know HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from qvl.errors import InvalidRequest
from qvl.types import MAX_LOGPROBS, MAX_N, ChatRequest, CompletionRequest, PixelLimits, SamplingParams
from qvl.wire.content import read_limits, read_messages
from qvl.wire.fields import Count, Fields, SamplingFields, TokenId, read_fields, read_object
from qvl.wire.responses import Options
from qvl.wire.structured import ConstraintFields

Body = Mapping[str, Any] | bytes


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A parsed chat completion: `model` and `overflow` are None where the caller leaves the choice to the server."""

    model: str | None
    request: ChatRequest
    stream: bool
    options: Options
    overflow: Literal["error", "window", "summary"] | None = None


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """A parsed plain completion: one request per prompt; answers of prompt i have the indices i * n and on."""

    model: str | None
    requests: tuple[CompletionRequest, ...]
    stream: bool
    options: Options


@dataclass(frozen=True, slots=True)
class TokenizeCall:
    """A parsed `/tokenize`."""

    model: str | None
    request: ChatRequest | CompletionRequest
    return_token_strs: bool


@dataclass(frozen=True, slots=True)
class DetokenizeCall:
    """A parsed `/detokenize`."""

    model: str | None
    token_ids: tuple[int, ...]


class TemplateFields(Fields):
    """Variables of the chat template. There is no model here that thinks before it answers."""

    add_vision_id: bool | None = None
    enable_thinking: Literal[False] | None = None
    thinking: Literal[False] | None = None


class PromptFields(Fields):
    """How a conversation becomes a prompt."""

    messages: list[Any]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_vision_id: bool | None = None
    chat_template_kwargs: TemplateFields | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    def chat_request(self, sampling: SamplingParams, cache_salt: str | None) -> ChatRequest:
        continues = bool(self.continue_final_message)
        if continues and self.add_generation_prompt:
            raise InvalidRequest(
                "'continue_final_message' and 'add_generation_prompt' exclude each other",
                param="continue_final_message",
            )
        template = self.chat_template_kwargs or TemplateFields()
        limits = PixelLimits()
        if self.mm_processor_kwargs is not None:
            limits = read_limits(self.mm_processor_kwargs, "mm_processor_kwargs")
        return ChatRequest(
            messages=read_messages(self.messages),
            sampling=sampling,
            limits=limits,
            add_generation_prompt=not continues and self.add_generation_prompt is not False,
            continue_final_message=continues,
            add_vision_id=bool(template.add_vision_id if self.add_vision_id is None else self.add_vision_id),
            cache_salt=cache_salt or "",
        )


class ChatBody(SamplingFields, ConstraintFields, PromptFields):
    """`POST /v1/chat/completions`."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None
    overflow: Literal["error", "window", "summary"] | None = None

    def parsed(self) -> ChatCall:
        sampling = self.sampling(self._max_tokens(), self._logprobs(), self.constraint())
        request = self.chat_request(sampling, self.cache_salt)
        return ChatCall(self.model, request, bool(self.stream), self.options(), self.overflow)

    def _max_tokens(self) -> int | None:
        old, new = self.max_tokens, self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise InvalidRequest("'max_tokens' and 'max_completion_tokens' differ", param="max_completion_tokens")
        return old if new is None else new

    def _logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SamplingFields, ConstraintFields):
    """`POST /v1/completions`."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: Count | None = None

    def parsed(self) -> CompletionCall:
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("'logprobs' of an echoed prompt are not supported by this version", param="logprobs")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise InvalidRequest(f"'logprobs' must be from 0 to {MAX_LOGPROBS}", param="logprobs")
        sampling = self.sampling(self.max_tokens, self.logprobs, self.constraint())
        prompts = _prompts(self.prompt)
        if len(prompts) * sampling.n > MAX_N:
            raise InvalidRequest(f"'prompt' times 'n' must be at most {MAX_N} answers", param="prompt")
        salt = self.cache_salt or ""
        requests = tuple(CompletionRequest(prompt, sampling, bool(self.echo), salt) for prompt in prompts)
        return CompletionCall(self.model, requests, bool(self.stream), self.options())


class TokenizeTextBody(Fields):
    """`POST /tokenize` with a plain text."""

    prompt: str
    model: str | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(PromptFields):
    """`POST /tokenize` with a conversation."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Fields):
    """`POST /detokenize`."""

    tokens: Annotated[list[TokenId], Field(max_length=10_000_000)]
    model: str | None = None


def parse_chat(body: Body) -> ChatCall:
    """`body`: the JSON object or its bytes. Raises `InvalidRequest` with `param`."""
    return read_fields(ChatBody, read_object(body)).parsed()


def parse_completion(body: Body) -> CompletionCall:
    """`body`: the JSON object or its bytes. Raises `InvalidRequest` with `param`."""
    return read_fields(CompletionBody, read_object(body)).parsed()


def parse_tokenize(body: Body) -> TokenizeCall:
    """Either `prompt` or `messages`. Raises `InvalidRequest` with `param`."""
    values = read_object(body)
    if ("prompt" in values) == ("messages" in values):
        raise InvalidRequest("give either 'prompt' or 'messages'", param="prompt")
    if "prompt" in values:
        text = read_fields(TokenizeTextBody, values)
        return TokenizeCall(text.model, CompletionRequest(text.prompt), bool(text.return_token_strs))
    chat = read_fields(TokenizeChatBody, values)
    return TokenizeCall(chat.model, chat.chat_request(SamplingParams(), None), bool(chat.return_token_strs))


def parse_detokenize(body: Body) -> DetokenizeCall:
    """`body`: the JSON object or its bytes. Raises `InvalidRequest` with `param`."""
    fields = read_fields(DetokenizeBody, read_object(body))
    return DetokenizeCall(fields.model, tuple(fields.tokens))


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("'prompt' must not be empty", param="prompt")
    if isinstance(prompt[0], int):
        return [tuple(id for id in prompt if isinstance(id, int))]
    return [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]
