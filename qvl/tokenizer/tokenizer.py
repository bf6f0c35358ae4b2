"""The tokenizer that everybody holds: text to ids, ids to text, conversations to prompt segments.

Knows that only a template may write control tokens. Does not know pictures (it marks where they go), HTTP or devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from qvl.errors import InvalidRequest
from qvl.prompt import Control, TextRun
from qvl.specs import SpecialIds
from qvl.tokenizer.template import NONCE_CHARS, ChatTemplate, MediaSlot, find_template
from qvl.tokenizer.vocabulary import Vocabulary
from qvl.types import MediaPart, Message, TextPart

_NONCE = re.compile(f"[\ue000-\uefff]{{{NONCE_CHARS}}}")

ChatPiece: TypeAlias = TextRun | Control | MediaSlot


class Tokenizer:
    """Immutable once made, and safe to use from several threads.

    `vocab_size` is one above the largest known id. `special_ids` are the added tokens flagged special, which `decode`
    leaves out.
    """

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate, ids: SpecialIds | None = None) -> None:
        self._vocabulary = vocabulary
        self._template = template
        self.vocab_size = vocabulary.size
        self.special_ids = frozenset(id for id, token in vocabulary.added.items() if token.special)
        self._added = {token.text: id for id, token in vocabulary.added.items()}
        self._added_pattern = _any_of(self._added)
        image_pad = ids.image_pad if ids else self._added.get("<|image_pad|>")
        video_pad = ids.video_pad if ids else self._added.get("<|video_pad|>")
        self._slots = {image_pad: MediaSlot("image"), video_pad: MediaSlot("video")}

    @classmethod
    def from_folder(cls, folder: str | Path, ids: SpecialIds | None = None) -> Tokenizer:
        """Read tokenizer.json and the chat template. Raises `CheckpointError` naming the file."""
        folder = Path(folder)
        return cls(Vocabulary.from_folder(folder), ChatTemplate(*find_template(folder)), ids)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens spelt out in it are plain text."""
        return self._vocabulary.encode(text)

    def is_longer_than(self, text: str, num_tokens: int) -> bool:
        """Whether `text` certainly has more than `num_tokens` tokens, without encoding all of it."""
        return self._vocabulary.is_longer_than(text, num_tokens)

    def encode_control(self, text: str) -> list[int]:
        """Ids of trusted text, in which spelt-out control tokens are meant."""
        ids: list[int] = []
        for piece in self._pieces(text):
            ids += [piece] if isinstance(piece, int) else self._vocabulary.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.token_bytes(id) for id in ids if id not in skipped).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token: possibly half a character; of a control token its spelling."""
        return self._vocabulary.token_bytes(token_id)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
    ) -> list[ChatPiece]:
        """The conversation in the checkpoint's own format, with a slot for every picture and video, in order.

        Text between two control tokens is one `TextRun`, whoever wrote it, so that it tokenises as the reference does.
        `continue_final_message` ends the prompt inside the last message (and writes no generation prompt), which must
        end in text. Raises `InvalidRequest`.
        """
        if not messages:
            raise InvalidRequest("'messages' must not be empty", param="messages")
        generation_prompt = add_generation_prompt and not continue_final_message
        rendered = self._template.render(messages, add_generation_prompt=generation_prompt, add_vision_id=add_vision_id)
        text = rendered.text
        if continue_final_message:
            text = _cut_after_last_text(text, rendered.texts, messages[-1])
        pieces = self._segments(text, rendered.texts)
        _check_slots(pieces, messages)
        return pieces

    def _segments(self, rendered: str, texts: Mapping[str, str]) -> list[ChatPiece]:
        segments: list[ChatPiece] = []
        for piece in self._pieces(rendered):
            if isinstance(piece, str):
                segments.append(TextRun(_NONCE.sub(lambda nonce: texts[nonce.group()], piece)))
            else:
                segments.append(self._slots.get(piece) or Control(piece))
        return segments

    def _pieces(self, text: str) -> Iterable[str | int]:
        """`text` cut at the spellings of added tokens, which become their ids; no two strings follow each other."""
        start = 0
        for found in self._added_pattern.finditer(text):
            if found.start() > start:
                yield text[start : found.start()]
            yield self._added[found.group()]
            start = found.end()
        if start < len(text):
            yield text[start:]


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `words`, the longest first; nothing when there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _cut_after_last_text(rendered: str, texts: Mapping[str, str], last: Message) -> str:
    if not last.parts or not isinstance(last.parts[-1], TextPart) or not last.parts[-1].text:
        raise InvalidRequest("'continue_final_message' needs a last message that ends in text", param="messages")
    nonce = list(texts)[-1]
    end = rendered.find(nonce)
    if end < 0:
        raise InvalidRequest("the checkpoint's chat template drops the last message", param="messages")
    return rendered[: end + len(nonce)]


def _check_slots(pieces: Sequence[ChatPiece], messages: Sequence[Message]) -> None:
    slots = [piece.kind for piece in pieces if isinstance(piece, MediaSlot)]
    media = [part.kind for message in messages for part in message.parts if isinstance(part, MediaPart)]
    if slots != media:
        raise InvalidRequest(
            f"the checkpoint's chat template makes room for {len(slots)} pictures and videos "
            f"where the messages hold {len(media)}",
            param="messages",
        )
