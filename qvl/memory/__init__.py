"""Conversations that never overflow: a token budget per request, summaries, and a store in which nothing is lost.

`window` decides, `fit` makes one request of a conversation (and is all that a server needs), `store` keeps,
`conversation` brings them together for programs. Knows no model and no torch.
"""

from __future__ import annotations

from qvl.memory.conversation import AsyncConversation, Conversation, Reply
from qvl.memory.costs import Measured
from qvl.memory.counting import (
    AsyncServerCounter,
    AsyncTokenCounter,
    AsyncUsageCounter,
    LocalCounter,
    ServerCounter,
    TokenCounter,
    UsageCounter,
)
from qvl.memory.database import data_folder
from qvl.memory.export import export_json, export_markdown
from qvl.memory.fit import Fitted, Notice, fit
from qvl.memory.media import Keep
from qvl.memory.records import Forgotten, Hit, Info, Summary, Turn
from qvl.memory.steps import Ask, Count, adrive, drive
from qvl.memory.store import Store
from qvl.memory.summary import Running
from qvl.memory.window import STRATEGIES, Budget, Strategy

__all__ = [
    "STRATEGIES",
    "Ask",
    "AsyncConversation",
    "AsyncServerCounter",
    "AsyncTokenCounter",
    "AsyncUsageCounter",
    "Budget",
    "Conversation",
    "Count",
    "Fitted",
    "Forgotten",
    "Hit",
    "Info",
    "Keep",
    "LocalCounter",
    "Measured",
    "Notice",
    "Reply",
    "Running",
    "ServerCounter",
    "Store",
    "Strategy",
    "Summary",
    "TokenCounter",
    "Turn",
    "UsageCounter",
    "adrive",
    "data_folder",
    "drive",
    "export_json",
    "export_markdown",
    "fit",
]
