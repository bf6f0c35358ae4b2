"""Streamed text against the whole decode, with random byte-level vocabularies; stop strings against a plain search."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.engine.detokenizer import Detokenizer, StopMatcher
from qvl.tokenizer import Tokenizer
from qvl.types import SamplingParams

TEXT = "Grüße, 世界! 👩‍👩‍👧 ab abab 𝄞é\n"


class Vocabulary:
    """Token i is `pieces[i]`; decoding as a byte-level tokenizer does."""

    def __init__(self, pieces: Sequence[bytes], special: Sequence[int] = ()) -> None:
        self.pieces = list(pieces)
        self.special_ids = frozenset(special)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join(self.pieces[i] for i in ids if i not in skipped).decode("utf-8", "replace")


@st.composite
def slices(draw: st.DrawFn) -> bytes:
    """Some bytes of real text, characters cut anywhere."""
    start = draw(st.integers(0, len(TEXT.encode()) - 1))
    return TEXT.encode()[start : start + draw(st.integers(1, 5))]


pieces = st.lists(slices() | st.binary(min_size=1, max_size=3), min_size=1, max_size=12)


@st.composite
def answers(draw: st.DrawFn) -> tuple[Vocabulary, list[list[int]]]:
    """A vocabulary, and token ids in groups as steps would deliver them."""
    vocabulary = Vocabulary(draw(pieces), draw(st.lists(st.integers(0, 11), max_size=2)))
    ids = st.integers(0, len(vocabulary.pieces) - 1)
    return vocabulary, draw(st.lists(st.lists(ids, max_size=3), min_size=1, max_size=12))


@settings(max_examples=150, deadline=None)
@given(answer=answers(), skip=st.booleans())
def test_pieces_joined_are_the_whole_decode(answer: tuple[Vocabulary, list[list[int]]], skip: bool) -> None:
    vocabulary, groups = answer
    detokenizer = Detokenizer(vocabulary, SamplingParams(skip_special_tokens=skip))
    said = ""
    whole = vocabulary.decode([token for group in groups for token in group], skip)
    for group in groups[:-1]:
        said += detokenizer.feed(group).text
        assert whole.startswith(said)
    said += detokenizer.feed(groups[-1], "length").text
    assert said == whole


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), cut=st.integers(1, 3))
def test_valid_text_is_never_shown_with_a_replacement(text: str, cut: int) -> None:
    data = text.encode()
    vocabulary = Vocabulary([data[i : i + cut] for i in range(0, len(data), cut)])
    detokenizer = Detokenizer(vocabulary, SamplingParams())
    said = ""
    for number in range(len(vocabulary.pieces)):
        said += detokenizer.feed([number]).text
        whole = data[: (number + 1) * cut]
        assert said == whole.decode("utf-8", "ignore")  # everything that is complete, at once
    assert said + detokenizer.feed([], "length").text == text


def search(vocabulary: Vocabulary, ids: Sequence[int], params: SamplingParams) -> tuple[str, str | None, int]:
    """Text, stop and tokens by looking at every beginning of the text."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text, owner = "", []
    for number, token in enumerate([*ids, None], start=1):
        data = vocabulary.pieces[token] if token is not None and token not in vocabulary.special_ids else b""
        gained = decoder.decode(data, final=token is None)
        text += gained
        owner += [min(number, len(ids))] * len(gained)
    for end in range(1, len(text) + 1):
        complete = [stop for stop in params.stop if text[:end].endswith(stop)]
        if complete and owner[end - 1] > params.min_tokens:
            stop = max(complete, key=len)
            return text[: end if params.include_stop_str_in_output else end - len(stop)], stop, owner[end - 1]
    return text, None, len(ids)


@settings(max_examples=300, deadline=None)
@given(
    answer=st.lists(st.integers(0, 9), max_size=20),
    stops=st.lists(st.text("ab世👧\ufffd", min_size=1, max_size=4), min_size=1, max_size=3),
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
    at_once=st.booleans(),
)
def test_stop_strings_wherever_the_tokens_are_cut(
    answer: list[int], stops: list[str], min_tokens: int, include: bool, at_once: bool
) -> None:
    smile = "👧".encode()
    vocabulary = Vocabulary(
        [b"a", b"b", b"ab", b"ba", "世".encode(), smile[:2], smile[2:], smile, b"\xff", b"aab"], [7]
    )
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include)
    text, stop, num_tokens = search(vocabulary, answer, params)
    detokenizer = Detokenizer(vocabulary, params)
    said, hit, used = "", None, 0
    for group in [answer] if at_once else [[token] for token in answer]:
        piece = detokenizer.feed(group)
        said, hit, used = said + piece.text, piece.stop, used + piece.num_tokens
        assert text.startswith(said), "said what it would have to take back"
        if hit is not None:
            break
    if hit is None:
        piece = detokenizer.feed([], "length")
        said, hit = said + piece.text, piece.stop
    assert (said, hit, used) == (text, stop, num_tokens)


def test_only_a_possible_stop_is_held_back() -> None:
    vocabulary = Vocabulary([b"x", b"END", b"EN", b"D!", b"E"])
    detokenizer = Detokenizer(vocabulary, SamplingParams(stop=("END!",)))
    assert [detokenizer.feed([i]).text for i in (0, 2, 4, 2)] == ["x", "", "EN", "E"]
    piece = detokenizer.feed([3, 0])
    assert (piece.text, piece.stop, piece.num_tokens) == ("", "END!", 1)


def test_the_longest_of_the_stops_that_end_together_counts() -> None:
    detokenizer = Detokenizer(Vocabulary([b"xab"]), SamplingParams(stop=("b", "ab", "ab")))
    assert detokenizer.feed([0]).stop == "ab"


def test_a_stop_that_will_be_shown_holds_nothing_back() -> None:
    detokenizer = Detokenizer(
        Vocabulary([b"EN", b"D!"]), SamplingParams(stop=("END",), include_stop_str_in_output=True)
    )
    assert detokenizer.feed([0]).text == "EN"
    assert detokenizer.feed([1]).text == "D"


def test_what_was_held_back_is_said_at_the_end() -> None:
    vocabulary = Vocabulary([b"almost EN", b"\xe4\xb8"])
    detokenizer = Detokenizer(vocabulary, SamplingParams(stop=("END",)))
    assert detokenizer.feed([0]).text == "almost "
    assert detokenizer.feed([1], "length").text == "EN\ufffd"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_the_token_that_ended_the_answer_is_text_only_when_asked_for(include: bool, text: str) -> None:
    detokenizer = Detokenizer(Vocabulary([b"a", b"b"]), SamplingParams(include_stop_str_in_output=include))
    assert detokenizer.feed([0, 1], "stop").text == text


def test_a_special_end_token_stays_hidden() -> None:
    detokenizer = Detokenizer(Vocabulary([b"a", b"<end>"], [1]), SamplingParams(include_stop_str_in_output=True))
    assert detokenizer.feed([0, 1], "stop").text == "a"


def test_nothing_is_fed_after_the_end() -> None:
    detokenizer = Detokenizer(Vocabulary([b"a"]), SamplingParams(stop=("a",)))
    assert detokenizer.feed([0]).stop == "a"
    with pytest.raises(AssertionError):
        detokenizer.feed([0])


@given(text=st.text("ab", max_size=30), stop=st.text("ab", min_size=1, max_size=6))
def test_the_matcher_knows_the_longest_beginning(text: str, stop: str) -> None:
    matcher = StopMatcher(stop)
    for end in range(1, len(text) + 1):
        assert matcher.feed(text[end - 1]) == text[:end].endswith(stop)
        longest = max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]))
        assert matcher.pending == longest


def test_with_a_real_tokenizer(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_folder(checkpoint)
    ids = [*tokenizer.encode(TEXT * 3), *sorted(tokenizer.special_ids)[:2], *tokenizer.encode("end")]
    for skip in (True, False):
        detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
        said = [detokenizer.feed([token]).text for token in ids] + [detokenizer.feed([], "length").text]
        assert "".join(said) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert not any("\ufffd" in piece for piece in said)


def test_a_stop_string_at_the_very_end_is_not_the_end_tokens() -> None:
    """Half a character becomes the stop string when the engine says that the answer is over: three ids belong to it."""
    vocabulary = Vocabulary([b"a", "é".encode()[:1], b"<end>"])
    detokenizer = Detokenizer(vocabulary, SamplingParams(stop=("a\ufffd",)))
    assert detokenizer.feed([0, 0, 1, 2], "stop") == ("a", 3, "a\ufffd")
