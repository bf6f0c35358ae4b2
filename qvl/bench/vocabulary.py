"""A byte-level BPE of Qwen2's size and ids, made up: what a shape is measured with where nothing is downloaded.

Common English words are one token each, with and without the space before them, so a prompt of n such words has as many
tokens as with the published vocabulary. All other tokens are made-up words. Whatever id random weights choose, it is
text of whole characters (only the 128 bytes above ASCII, which a byte-level BPE cannot do without, are not), so that a
streamed answer has text in every step. Knows the format of tokenizer.json. Does not know Qwen's words.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from qvl.bench.load.prompts import WORDS
from qvl.tokenizer.template import CHATML

NUM_PLAIN = 151643  # ids of text; the control tokens follow
CONTROL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# The commonest words of English, and those of the chat template.
_COMMON = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part "
    "system user assistant helpful You"
).split()
# Qwen2's cuts: contractions, words with one character before them, single digits, signs, line ends, other space.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "Ġ"  # as the byte-level alphabet writes it


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template. Takes about a second."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _WORD}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, **token} for id, token in _added().items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": _bpe([*_COMMON, *WORDS]),
    }
    (folder / "tokenizer.json").write_bytes(msgspec.json.format(msgspec.json.encode(tokenizer), indent=2))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": 32768,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "chat_template": CHATML,
        "added_tokens_decoder": {str(id): token for id, token in _added().items()},
    }
    for name, value in (("tokenizer_config.json", config), ("chat_template.json", {"chat_template": CHATML})):
        (folder / name).write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))


def _added() -> dict[int, dict[str, Any]]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {NUM_PLAIN + place: {"content": text, **plain} for place, text in enumerate(CONTROL_TOKENS)}


def _bpe(words: Iterable[str]) -> dict[str, Any]:
    """The `model` section: bytes, then one token for each merge, as in Qwen2."""
    tokens = dict.fromkeys(_byte_alphabet())
    merges: dict[tuple[str, str], int] = {}
    for word in dict.fromkeys(words):
        for spelling in (_SPACE + word, word):
            tokens.update(dict.fromkeys(_teach(spelling, merges)))
    fresh = ((left, right) for left, right in _made_up() if left + right not in tokens)
    for left, right in itertools.islice(fresh, NUM_PLAIN - len(tokens)):
        merges[left, right] = len(merges)
        tokens[left + right] = None
    assert len(tokens) == NUM_PLAIN
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": [f"{left} {right}" for left, right in merges],
    }


def _teach(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """Add the merges that `word` lacks to be one token; the tokens they make.

    A later merge never comes before an earlier one, so the words taught before stay whole.
    """
    made = []
    parts = _merge(list(word), merges)
    while len(parts) > 1:
        merges[parts[0], parts[1]] = len(merges)
        made.append(parts[0] + parts[1])
        parts = _merge(list(word), merges)
    return made


def _merge(parts: list[str], merges: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the earliest merge first."""
    while True:
        known = [(merges[pair], place) for place, pair in enumerate(itertools.pairwise(parts)) if pair in merges]
        if not known:
            return parts
        place = min(known)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def _made_up() -> Iterator[tuple[str, str]]:
    """Halves of made-up words such as " bal"+"kon", those of the halves first; more than are needed."""
    open_ones = list(itertools.product("bdfghklmnprstvz", "aeiou"))
    yield from open_ones
    closed = [(head + vowel, tail) for (head, vowel), tail in itertools.product(open_ones, "klmnrst")]
    yield from closed
    syllables = [left + right for left, right in (*open_ones, *closed)]
    yield from ((_SPACE, syllable) for syllable in syllables)
    pairs = itertools.product(syllables, syllables)
    for left, right in pairs:
        yield left, right
        yield _SPACE + left, right


def _byte_alphabet() -> list[str]:
    """Printable bytes stand for themselves, the others are moved to U+0100 and on: the ids 0 to 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + place) for place in range(256 - len(printable)))]
