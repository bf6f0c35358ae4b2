"""Conversations are known again by how they begin, and by nothing less."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from qvl.memory import growing
from qvl.memory.growing import Growing, names_of
from qvl.memory.summary import Running
from qvl.types import ChatRequest, MediaPart, Message, PixelLimits, TextPart
from tests.memory.scripted import picture, said, user

TALK = (said("Be brief.", "system"), user(picture("data:,a"), "what?"), said("a dog"), user("sure?"))


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    short, long = names_of(ChatRequest(TALK[:3])), names_of(ChatRequest(TALK))
    assert long.messages[:3] == short.messages
    assert long.beginnings[:4] == short.beginnings
    assert len(long.beginnings) == len(TALK) + 1


def test_system_messages_do_not_count() -> None:
    other = names_of(ChatRequest((said("It is noon.", "system"), *TALK[1:])))
    without = names_of(ChatRequest(TALK[1:]))
    assert other.beginnings == names_of(ChatRequest(TALK)).beginnings
    assert other.beginnings[1:] == without.beginnings


def test_whatever_differs_has_another_name() -> None:
    limits = PixelLimits(max_pixels=9000)
    variants = [
        (user("ab"),),
        (user("a", "b"),),
        (user("a"), user("b")),
        (said("ab"),),
        (user("ab "),),
        (user(picture("ab")),),
        (user(MediaPart("image", "ab", limits)),),
        (user(MediaPart("video", "ab")),),
        (user(MediaPart("video", ("ab",))),),
        (user(MediaPart("video", ("a", "b"))),),
        (user(picture("x"), "ab"),),
        (user("ab", picture("x")),),
        (user("\ud800"),),
        (user(),),
    ]
    requests = [ChatRequest(messages) for messages in variants]
    requests += [replace(requests[0], cache_salt="s"), replace(requests[0], limits=limits)]
    requests += [replace(requests[0], add_vision_id=True)]
    ends = [names_of(request).beginnings[-1] for request in requests]
    assert all(a != b for a, b in itertools.combinations(ends, 2))


def test_the_longest_summary_is_found_and_only_by_who_begins_so() -> None:
    known, names = Growing(), names_of(ChatRequest(TALK)).beginnings
    assert known.running(names) is None
    known.remember(names, Running("short", 2, 9), None, 100)
    known.remember(names, Running("long", 3, 11), 3, 200)
    assert known.running(names) == Running("long", 3, 11)
    assert known.running(names[:3]) == Running("short", 2, 9)
    assert known.running(names[:2]) is None
    assert (known.measured(names).cut, known.measured(names[:3]).cut) == (3, None)
    assert [known.is_long(names, room) for room in (200, 201)] == [True, False]
    assert [known.is_long(names[:3], room) for room in (100, 101)] == [True, False]
    changed = names_of(ChatRequest((TALK[0], user(picture("data:,b"), "what?"), *TALK[2:]))).beginnings
    assert (known.running(changed), known.measured(changed).cut, known.is_long(changed, 1)) == (None, None, False)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "MOST_BEGINNINGS", 3)
    monkeypatch.setattr(growing, "MOST_EXCHANGES", 5)
    known = Growing()
    talks = [names_of(ChatRequest((user(str(i)), said("yes"), user("next")))).beginnings for i in range(5)]
    for number, names in enumerate(talks):
        known.remember(names, Running(str(number), 2, 1), 2, 9)
        known.remember(talks[0], Running("0", 2, 1), 2, 9)  # still talked
    assert [known.running(names) is not None for names in talks] == [True, False, False, True, True]
    measured = known.measured(talks[0])
    measured.exchanges.update({(i,): i for i in range(6)})
    assert known.measured(talks[0]).exchanges == {}


def test_a_message_is_named_by_every_part() -> None:
    message = Message("user", (TextPart("a"), picture("p"), TextPart("b")))
    swapped = Message("user", (TextPart("b"), picture("p"), TextPart("a")))
    (one,), (two,) = (names_of(ChatRequest((each,))).messages for each in (message, swapped))
    assert one != two
