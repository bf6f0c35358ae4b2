"""The made-up vocabulary: Qwen2's size and counts, and text for every id."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as LibraryTokenizer

from qvl.bench.load.prompts import WORDS, words
from qvl.bench.vocabulary import CONTROL_TOKENS, NUM_PLAIN, write_tokenizer
from qvl.prompt import Control, TextRun
from qvl.tokenizer import MediaSlot, Tokenizer
from qvl.types import MediaPart, Message, TextPart

# What other load generators ask with: the commonest words of English.
COMMON = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("spelling", ["{}", " {}"])
def test_a_common_word_is_one_token(tokenizer: Tokenizer, spelling: str) -> None:
    for word in {*COMMON, *WORDS}:
        assert len(tokenizer.encode(spelling.format(word))) == 1, word


def test_a_chat_has_as_many_tokens_as_with_the_published_vocabulary(tokenizer: Tokenizer) -> None:
    """147 = 128 words and the template; 1,422 = 32 words, a picture of 1,369 tokens and its two marks; and so on."""
    assert count(tokenizer, 128, 0, 0) == 147
    assert count(tokenizer, 32, 1, 1369) == 1422
    assert count(tokenizer, 64, 1, 256) == 341
    assert count(tokenizer, 512, 0, 0) == 531
    assert count(tokenizer, 64, 4, 1369) == 5567


def count(tokenizer: Tokenizer, num_words: int, pictures: int, picture_tokens: int) -> int:
    parts = [MediaPart("image", "data:,")] * pictures
    pieces = tokenizer.chat([Message("user", (*parts, TextPart(words(num_words, 5))))])
    total = 0
    for piece in pieces:
        if isinstance(piece, TextRun):
            total += len(tokenizer.encode(piece.text))
        else:
            assert isinstance(piece, Control | MediaSlot)
            total += picture_tokens if isinstance(piece, MediaSlot) else 1
    return total


def test_every_id_is_text_of_whole_characters(tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.token_bytes(id) for id in range(NUM_PLAIN)]
    assert len(set(tokens)) == NUM_PLAIN
    above_ascii = [token for token in tokens if max(token) > 127]
    assert sorted(above_ascii) == [bytes([byte]) for byte in range(128, 256)]
    unprintable = [token for token in tokens if not token.decode("latin-1").isprintable() and len(token) > 1]
    assert unprintable == []


def test_control_tokens_stand_where_qwen2_has_them(folder: Path, tokenizer: Tokenizer) -> None:
    library = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    assert [library.token_to_id(token) for token in CONTROL_TOKENS] == list(range(151643, 151657))
    assert library.get_vocab_size() == tokenizer.vocab_size == 151657
    assert tokenizer.encode_control("<|im_start|>") == [151644]


@pytest.mark.parametrize("text", ["Grüße, 世界 🙂!\n\n  x = 12;", "a\tb\u0000c", "éé", "balkon   bal"])
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
