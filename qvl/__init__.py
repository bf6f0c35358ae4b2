"""qvl serves the Qwen-VL family from a checkpoint folder: over HTTP, from the command line and in process.

Names are loaded when first used (PEP 562), so that `import qvl` imports no torch: the HTTP process never needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl import tasks as tasks
    from qvl.client import AsyncClient, Client, screenshot
    from qvl.engine.llm import LLM
    from qvl.errors import QvlError
    from qvl.types import (
        Answer,
        ChatRequest,
        Completion,
        CompletionRequest,
        Constraint,
        Delta,
        MediaPart,
        Message,
        PixelLimits,
        SamplingParams,
        TextPart,
        TokenLogprob,
        Usage,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Answer",
    "AsyncClient",
    "ChatRequest",
    "Client",
    "Completion",
    "CompletionRequest",
    "Constraint",
    "Delta",
    "MediaPart",
    "Message",
    "PixelLimits",
    "QvlError",
    "SamplingParams",
    "TextPart",
    "TokenLogprob",
    "Usage",
    "screenshot",
]

_ELSEWHERE = {
    "AsyncClient": "qvl.client",
    "Client": "qvl.client",
    "LLM": "qvl.engine.llm",
    "QvlError": "qvl.errors",
    "screenshot": "qvl.client",
}


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return importlib.import_module("qvl.tasks")
    if name not in __all__:
        raise AttributeError(f"module 'qvl' has no attribute '{name}'")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "qvl.types")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
