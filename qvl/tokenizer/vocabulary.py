"""The byte-level BPE of a checkpoint: plain text to ids, ids to exact bytes.

Added tokens (`<|im_start|>`, but also unflagged ones such as `<tool_call>`) are taken out of the library's tokenizer,
which would otherwise find them in any text: here they are a table of names and ids, and text is only ever text. Does
not know which of them a template may write.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as LibraryTokenizer

from qvl.errors import CheckpointError, InvalidRequest

_FILE = "tokenizer.json"
LEAST_LOOK = 1 << 16  # characters that are always encoded at once
SHORT = 64  # characters; such texts come again and again: they are a template's own
QUICK = 2048  # characters, for a millisecond
CHARS_LOOKED_AT = 4  # for each token in question; usual text has about as many


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet undone: printable bytes stand for themselves, the others are moved to U+0100 and on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token outside the BPE. `special` ones are left out of decoded text on request."""

    token_id: int
    text: str
    special: bool


class Vocabulary:
    """Read-only after construction, and safe to use from several threads."""

    def __init__(self, bpe: LibraryTokenizer, added: dict[int, AddedToken]) -> None:
        self._bpe = bpe
        self.added = added
        self.size = max(bpe.get_vocab_size(), *(id + 1 for id in added), 0)
        self._bytes: dict[int, bytes] = {id: token.text.encode() for id, token in added.items()}
        self._short = lru_cache(1024)(self._encoded)

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary:
        """Read tokenizer.json. Raises `CheckpointError` when it is missing, broken or not a byte-level BPE."""
        path = folder / _FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: {_FILE} is missing")
        try:
            content: Any = msgspec.json.decode(path.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{_FILE}: not valid JSON ({error})") from error
        if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
            raise CheckpointError(f"{_FILE}: 'model' is missing")
        if '"ByteLevel"' not in msgspec.json.encode(content.get("decoder")).decode():
            raise CheckpointError(
                f"{_FILE}: 'decoder' is not ByteLevel; this version reads byte-level BPE vocabularies"
            )
        added = _read_added(content.get("added_tokens") or [])
        bare = {**content, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        try:
            bpe = LibraryTokenizer.from_str(msgspec.json.encode(bare).decode())
        except Exception as error:  # the library raises bare Exception for everything it cannot read
            raise CheckpointError(f"{_FILE}: {error}") from error
        return cls(bpe, added)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Raises `InvalidRequest` for text that is not Unicode (lone surrogates)."""
        try:
            return list(self._short(text)) if len(text) <= SHORT else self._encoded(text)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("text must be valid Unicode without lone surrogates") from error

    def _encoded(self, text: str) -> list[int]:
        """A long text takes a tenth of a second, in which others get the interpreter; to ask for it back, among many
        threads, takes longer than a short text does."""
        if len(text) <= QUICK:
            ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        else:
            ids = self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def is_longer_than(self, text: str, num_tokens: int) -> bool:
        """Whether `text` certainly has more than `num_tokens` tokens, from no more of it than that takes to see.

        False may also mean that only encoding all of it would tell.
        """
        size = max(LEAST_LOOK, CHARS_LOOKED_AT * num_tokens)
        while size < len(text):
            words = self._bpe.encode(text[:size], add_special_tokens=False).word_ids
            # The last words may go on behind the cut; what stands before them stays as it is.
            if bisect_left(words, words[-1] - 1) > num_tokens:
                return True
            size *= CHARS_LOOKED_AT
        return False

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token; none for ids beyond the vocabulary (embeddings are padded)."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._undo_alphabet(token_id) if 0 <= token_id < self.size else b""
        return found

    def _undo_alphabet(self, token_id: int) -> bytes:
        token = self._bpe.id_to_token(token_id) or ""
        try:
            return bytes([_BYTE_OF_CHAR[char] for char in token])
        except KeyError:  # a token that is not spelt in the byte-level alphabet stands for its own text
            return str(token).encode()


def _read_added(entries: list[Any]) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int) or not entry.get("content"):
            raise CheckpointError(f"{_FILE}: 'added_tokens' must be objects with 'id' and 'content', not {entry!r}")
        for key in ("lstrip", "rstrip", "single_word"):
            if entry.get(key):
                raise CheckpointError(
                    f"{_FILE}: added token {entry['content']!r}: '{key}' is not served by this version"
                )
        added[entry["id"]] = AddedToken(entry["id"], entry["content"], bool(entry.get("special")))
    return added
