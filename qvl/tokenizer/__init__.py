"""Text to token ids and back, and conversations to prompt segments, by a checkpoint's own vocabulary and template."""

from __future__ import annotations

from qvl.tokenizer.template import MediaSlot
from qvl.tokenizer.tokenizer import Tokenizer

__all__ = ["MediaSlot", "Tokenizer"]
