"""Prompts are built, never scanned: segments become token ids; spans, positions and cache keys fall out of short loops.

Knows where every picture lies in a prompt, M-RoPE positions and the keys of prefix-cache blocks. Does not know
tokenizers (`encode` is handed in), pixels, or who holds a cache. Placeholder text typed by a user is only text:
the one way to a pad token is a `Vision` segment.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from qvl.types import Grid, MediaKind

KEY_BYTES = 16
ID_BYTES = 8
OPENING_ID_BYTES = 4
_BLOCK = hashlib.blake2b(digest_size=KEY_BYTES, person=b"qvl block")


@dataclass(frozen=True, slots=True)
class TextRun:
    """Plain text; control tokens in it are not parsed."""

    text: str


@dataclass(frozen=True, slots=True)
class Control:
    """One control token that the template (never a user) put here."""

    token_id: int


@dataclass(frozen=True, slots=True)
class Vision:
    """A picture or video: its grid in patches, and the 16-byte digest of everything its embedding depends on."""

    kind: MediaKind
    grid: Grid
    digest: bytes


@dataclass(frozen=True, slots=True)
class Opening:
    """How a block begins. Two blocks of one `family` share the keys and values of as many tokens as their `ids` begin
    alike (`OPENING_ID_BYTES` each, the highest byte first: sorted as bytes they are sorted token by token).
    """

    family: bytes
    ids: bytes


Segment: TypeAlias = TextRun | Control | Vision


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[offset, offset + length)` of the prompt are this picture's pads."""

    kind: MediaKind
    offset: int
    length: int
    grid: Grid
    digest: bytes

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine computes: token ids, and where the pictures lie in them (ascending, disjoint)."""

    token_ids: list[int]
    spans: tuple[Span, ...]


def build(
    segments: Iterable[Segment],
    encode: Callable[[str], list[int]],
    *,
    image_pad: int,
    video_pad: int,
    merge_size: int,
) -> Prompt:
    """Lay the segments end to end. `encode` must turn control tokens in its text into plain tokens."""
    token_ids: list[int] = []
    spans: list[Span] = []
    for segment in segments:
        if isinstance(segment, TextRun):
            token_ids += encode(segment.text)
        elif isinstance(segment, Control):
            token_ids.append(segment.token_id)
        else:
            length = segment.grid.num_tokens(merge_size)
            spans.append(Span(segment.kind, len(token_ids), length, segment.grid, segment.digest))
            token_ids += [image_pad if segment.kind == "image" else video_pad] * length
    return Prompt(token_ids, tuple(spans))


def mrope_positions(num_tokens: int, spans: Sequence[Span], merge_size: int) -> tuple[npt.NDArray[np.int64], int]:
    """Positions [3, num_tokens] on the axes time, height, width, and `rope_delta`.

    Text steps all three axes together. A picture or video counts its merged grid from the next free index, and
    text goes on after the largest index of the three axes. A token generated at index i has position i +
    rope_delta on every axis.
    """
    positions = np.empty((3, num_tokens), dtype=np.int64)
    done = index = 0  # tokens placed, next free position
    for span in spans:
        assert done <= span.offset <= span.end <= num_tokens, "spans are ascending, disjoint and inside the prompt"
        positions[:, done : span.offset] = np.arange(index, index + span.offset - done)
        index += span.offset - done
        axes = (span.grid.t, span.grid.h // merge_size, span.grid.w // merge_size)
        positions[:, span.offset : span.end] = np.indices(axes).reshape(3, -1) + index
        index += max(axes)
        done = span.end
    positions[:, done:] = np.arange(index, index + num_tokens - done)
    return positions, index + num_tokens - done - num_tokens


def block_keys(token_ids: Sequence[int], spans: Sequence[Span], block_size: int, salt: bytes = b"") -> list[bytes]:
    """One 16-byte key per full block of `block_size` tokens.

    A key covers everything that the block's keys and values depend on: the block before it (and so all earlier
    ones), its own ids, and each picture it touches with the place in that picture. `salt` keeps tenants apart.
    """
    keys: list[bytes] = []
    parent = root_key(salt)
    ids = _bytes_of(token_ids)
    num_blocks = len(token_ids) // block_size
    first = 0  # spans before this one end before the block
    while len(keys) < num_blocks:
        start = len(keys) * block_size
        end = start + block_size
        while first < len(spans) and spans[first].end <= start:
            first += 1
        touched = spans[first:] if first < len(spans) and spans[first].offset < end else ()
        if touched and touched[0].offset <= start and touched[0].end >= end:
            whole = min(num_blocks, touched[0].end // block_size) - len(keys)
            keys += _keys_inside(parent, touched[0], start, whole)
        else:
            keys.append(_next_key(parent, ids[start * ID_BYTES : end * ID_BYTES], touched, start, end))
        parent = keys[-1]
    return keys


def _keys_inside(parent: bytes, span: Span, start: int, count: int) -> list[bytes]:
    """Of `count` blocks from `start` on that hold nothing but pads of one picture: at once, as it may have hundreds.

    The output of the hash begins alike however long it is, so a prompt that ends sooner finds the same keys.
    """
    state = hashlib.shake_128(b"qvl picture" + parent + span.digest + (start - span.offset).to_bytes(8, "little"))
    together = state.digest(KEY_BYTES * count)
    return [together[at : at + KEY_BYTES] for at in range(0, len(together), KEY_BYTES)]


def root_key(salt: bytes = b"") -> bytes:
    """The parent of a prompt's first block."""
    return hashlib.blake2b(salt, digest_size=KEY_BYTES, person=b"qvl prompt").digest()


def extend_key(parent: bytes, token_ids: Sequence[int], spans: Iterable[Span] = (), start: int = 0) -> bytes:
    """Key of the full block `token_ids` that follows the block `parent` and is not inside of one picture.

    A block that begins in the prompt and ends in generated text may hold the end of a picture: give the prompt's
    `spans` (ascending) and `start`, the index of the block's first token. Blocks of generated text alone need
    neither.
    """
    return _next_key(parent, _bytes_of(token_ids), spans, start, start + len(token_ids))


def opening_of(parent: bytes, token_ids: Sequence[int], spans: Sequence[Span], start: int) -> Opening | None:
    """How the block `token_ids`, which need not be full, begins: it follows the block `parent`, from token `start` on.

    Its family are the blocks after the same `parent` that begin at the same place of the same picture, if at one. Its
    ids end before the first picture that begins later on. None where nothing but a picture is in the block.
    """
    end = start + len(token_ids)
    first = bisect_right(spans, start, key=lambda span: span.end)
    if first < len(spans) and spans[first].offset <= start:
        if spans[first].end >= end:
            return None
        parent = _next_key(parent, b"", spans[first : first + 1], start, end)
        first += 1
    if first < len(spans) and spans[first].offset < end:
        token_ids = token_ids[: spans[first].offset - start]
    return Opening(parent, np.asarray(token_ids, dtype=f">u{OPENING_ID_BYTES}").tobytes())


def _bytes_of(token_ids: Sequence[int]) -> bytes:
    return np.asarray(token_ids, dtype=np.int64).tobytes()


def _next_key(parent: bytes, ids: bytes, spans: Iterable[Span], start: int, end: int) -> bytes:
    """Hot: hundreds of times for a long prompt."""
    state = _BLOCK.copy()  # half the time of making one
    state.update(parent + ids)
    for span in spans:
        if span.offset >= end:
            break
        if span.end > start:
            state.update(span.digest)
            state.update((span.offset - start).to_bytes(8, "little", signed=True))
    return state.digest()
