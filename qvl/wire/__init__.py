"""OpenAI's shapes and their conversion to and from `qvl.types`, in both directions: the only place that knows them."""

from __future__ import annotations

from qvl.wire.content import LOW_DETAIL_PIXELS, read_messages
from qvl.wire.fields import read_json
from qvl.wire.reading import chat_body, completion_body, read_chunk, read_completion_chunk, read_error, read_response
from qvl.wire.requests import (
    ChatBody,
    ChatCall,
    CompletionBody,
    CompletionCall,
    DetokenizeBody,
    DetokenizeCall,
    TokenizeCall,
    TokenizeChatBody,
    TokenizeTextBody,
    parse_chat,
    parse_completion,
    parse_detokenize,
    parse_tokenize,
)
from qvl.wire.responses import (
    ChatWriter,
    CompletionWriter,
    Head,
    Options,
    Overflowed,
    add_usage,
    detokenize_response,
    error_body,
    model_list,
    tokenize_response,
)

__all__ = [
    "LOW_DETAIL_PIXELS",
    "ChatBody",
    "ChatCall",
    "ChatWriter",
    "CompletionBody",
    "CompletionCall",
    "CompletionWriter",
    "DetokenizeBody",
    "DetokenizeCall",
    "Head",
    "Options",
    "Overflowed",
    "TokenizeCall",
    "TokenizeChatBody",
    "TokenizeTextBody",
    "add_usage",
    "chat_body",
    "completion_body",
    "detokenize_response",
    "error_body",
    "model_list",
    "parse_chat",
    "parse_completion",
    "parse_detokenize",
    "parse_tokenize",
    "read_chunk",
    "read_completion_chunk",
    "read_error",
    "read_json",
    "read_messages",
    "read_response",
    "tokenize_response",
]
