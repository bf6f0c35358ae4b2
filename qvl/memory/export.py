"""A conversation as a file: JSON with everything that the store knows, or Markdown to read. Reads the store only."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvl.errors import InvalidRequest
from qvl.memory.media import Kept, digests_of
from qvl.memory.records import Info, Turn
from qvl.memory.store import Store
from qvl.types import MediaPart, Message, TextPart

FORMAT = "qvl conversation 1"

_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
_SUFFIXES = (
    (b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"GIF8", ".gif"), (b"RIFF", ".webp"), (b"\x1aE\xdf\xa3", ".webm"),
)  # fmt: skip


def export_json(store: Store, conversation_id: str, *, with_data: bool = False) -> dict[str, Any]:
    """Turns, summaries and pictures (`with_data`: their bytes too, in base64) as plain JSON values.

    Raises `InvalidRequest` where there is no such conversation.
    """
    info, turns = _find(store, conversation_id)
    digests = dict.fromkeys(digest for turn in turns for digest in digests_of(turn.message))
    return {
        "format": FORMAT,
        "id": info.id,
        "name": info.name,
        "created": info.created,
        "turns": [_turn(turn) for turn in turns],
        "summaries": [asdict(summary) for summary in store.summaries(info.id)],
        "media": {digest: _media(store.media(digest), with_data) for digest in digests},
    }


def export_markdown(store: Store, conversation_id: str, *, media_folder: Path | None = None) -> str:
    """The conversation as a page. `media_folder`: kept pictures are written there and linked.

    Without a folder pictures are linked to where they came from, or named. Raises `InvalidRequest` where there is no
    such conversation.
    """
    info, turns = _find(store, conversation_id)
    blocks = [f"# {info.title or info.id}", f"*{info.created}*"]
    numbers: Counter[str] = Counter()
    for turn in turns:
        blocks.append(f"## {_ROLES[turn.message.role]}")
        blocks += _blocks(store, turn.message, numbers, media_folder)
    return "\n\n".join(blocks) + "\n"


def _find(store: Store, conversation_id: str) -> tuple[Info, list[Turn]]:
    for info in store.conversations(limit=-1):
        if info.id == conversation_id:
            return info, store.turns(conversation_id)
    raise InvalidRequest(f"no conversation answers to '{conversation_id}'")


def _turn(turn: Turn) -> dict[str, Any]:
    return {
        "number": turn.number,
        "role": turn.message.role,
        "created": turn.created,
        "model": turn.model,
        "finish_reason": turn.finish_reason,
        "usage": None if turn.usage is None else asdict(turn.usage),
        "parts": [_part(part) for part in turn.message.parts],
    }


def _part(part: TextPart | MediaPart) -> dict[str, Any]:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    media = list(digests_of(Message("user", (part,))))
    limits = {name: value for name, value in asdict(part.limits).items() if value is not None}
    return {"type": part.kind, "media": media, "limits": limits}


def _media(kept: Kept, with_data: bool) -> dict[str, Any]:
    told = {"num_bytes": kept.num_bytes, "path": kept.path, "url": kept.url}
    if with_data and kept.data is not None:
        return {**told, "data": base64.b64encode(kept.data).decode()}
    return told


def _blocks(store: Store, message: Message, numbers: Counter[str], folder: Path | None) -> list[str]:
    blocks = []
    for part in message.parts:
        if isinstance(part, TextPart):
            blocks.append(part.text)
            continue
        numbers[part.kind] += 1
        name = f"{'picture' if part.kind == 'image' else 'video'} {numbers[part.kind]}"
        digests = digests_of(Message("user", (part,)))
        blocks += [_link(store.media(digest), name, folder) for digest in digests]
    return blocks


def _link(kept: Kept, name: str, folder: Path | None) -> str:
    if folder is not None and kept.data is not None:
        suffix = next((s for magic, s in _SUFFIXES if kept.data.startswith(magic)), Path(kept.path or "").suffix)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kept.digest}{suffix}").write_bytes(kept.data)
        return f"![{name}](<{folder.name}/{kept.digest}{suffix}>)"
    where = kept.url or kept.path
    return f"![{name}](<{where}>)" if where else f"[{name}: {kept.num_bytes} bytes, {kept.digest}]"
