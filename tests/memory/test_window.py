"""The arithmetic of what stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvl.errors import ConfigError, PromptTooLong
from qvl.memory.window import Budget, Cost, decide, keep_newest, keep_steadily, take_apart
from qvl.types import Message, TextPart
from tests.memory.scripted import said, user

costs = st.builds(Cost, st.integers(1, 120), st.integers(0, 3))
budgets = st.builds(
    lambda room, answer, media: Budget(room + answer, answer, 64, media),
    st.integers(64, 900),
    st.integers(1, 300),
    st.none() | st.integers(0, 6),
)


@given(
    st.lists(costs, max_size=12), costs, budgets, st.sampled_from(["window", "summary"]), st.none() | st.integers(1, 64)
)
def test_what_is_kept_never_exceeds_the_room(older, newest, budget, strategy, summary):  # type: ignore[no-untyped-def]
    if newest.tokens > budget.room:
        with pytest.raises(PromptTooLong):
            decide(older, newest, budget, strategy, summary)
        return
    decision = decide(older, newest, budget, strategy, summary)
    kept = older[len(older) - decision.keep :] if decision.keep else []
    most_summary = budget.summary if decision.fold else (summary or 0) if decision.with_summary else 0
    assert newest.tokens + most_summary + sum(cost.tokens for cost in kept) <= budget.room
    if budget.max_media is not None:
        media = sum(cost.media for cost in kept) + newest.media
        assert media <= max(budget.max_media, newest.media)
    assert decision.fold + decision.keep <= len(older)
    if decision.fold:
        assert strategy == "summary"
        assert decision.fold + decision.keep == len(older), "folding leaves no gap"


@given(st.lists(costs, max_size=10), costs, st.integers(1, 600), st.none() | st.integers(0, 9))
def test_keep_newest_keeps_as_many_as_fit(older, fixed, tokens, media):  # type: ignore[no-untyped-def]
    def fits(number: int) -> bool:
        chosen = [fixed, *older[len(older) - number :]]
        return sum(c.tokens for c in chosen) <= tokens and (media is None or sum(c.media for c in chosen) <= media)

    oracle = max((n for n in range(1, len(older) + 1) if all(fits(m) for m in range(1, n + 1))), default=0)
    assert keep_newest(older, fixed, tokens, media) == oracle


@given(st.lists(costs, max_size=12), costs, budgets, st.none() | st.integers(0, 14))
def test_what_stays_steadily_fits_and_is_not_much_less_than_could(older, newest, budget, stayed):  # type: ignore[no-untyped-def]
    if newest.tokens > budget.room:
        return
    media = None if budget.max_media is None else max(budget.max_media, newest.media)
    most = keep_newest(older, newest, budget.room, media)
    kept = keep_steadily(older, newest, budget, stayed)
    assert kept <= most
    if most == len(older) or kept == most:
        return
    assert kept >= 1, "one that could stay does"
    one_more = sum((cost.tokens for cost in older[len(older) - kept - 1 :]), newest.tokens)
    pictures = sum((cost.media for cost in older[len(older) - kept - 1 :]), newest.media)
    quarter = (budget.room - newest.tokens) // 4
    assert one_more > budget.room - quarter or (media is not None and pictures > media - media // 4)


def test_folding_waits_until_it_must_and_then_makes_room_for_some_turns() -> None:
    budget = Budget(1100, 100, 100)
    ten = [Cost(90)] * 10
    assert decide(ten[:9], Cost(100), budget, "summary").fold == 0
    decision = decide(ten, Cost(101), budget, "summary")
    assert (decision.fold, decision.keep) == (6, 4)  # (1000 - 201) / 2 = 399 tokens of turns stay


def test_none_takes_all_or_says_no() -> None:
    budget = Budget(300, 100, 64)
    assert decide([Cost(100)], Cost(100), budget, "none").keep == 1
    with pytest.raises(PromptTooLong, match="use the strategy summary or window"):
        decide([Cost(100)], Cost(101), budget, "none")
    with pytest.raises(PromptTooLong, match="send smaller pictures"):
        decide([], Cost(201), budget, "window")


def test_a_conversation_is_taken_apart_into_exchanges() -> None:
    tool = Message("tool", (TextPart("42"),))
    system = Message("system", (TextPart("s"),))
    messages = [said("hi"), system, user("a"), user("b"), said("1"), tool, said("2"), system, user("c"), user("d")]
    shape = take_apart(messages)
    assert shape.pinned == (1, 7)
    assert shape.older == ((0,), (2, 3, 4, 5, 6))
    assert shape.newest == (8, 9)
    split = shape.split_newest(messages)
    assert split is not None
    assert (split.older[-1], split.newest) == ((8,), (9,))
    assert split.split_newest(messages) is None


def test_a_system_message_between_two_user_turns_does_not_part_them() -> None:
    messages = [user("a"), Message("system", (TextPart("s"),)), user("b")]
    assert take_apart(messages).newest == (0, 2)


def test_budgets_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="leaves 50"):
        Budget(150, 100, 64)
    with pytest.raises(ConfigError):
        Budget(1000, 0, 64)
    with pytest.raises(ConfigError):
        Budget(1000, 100, 10)
    usual = Budget.of(2048)
    assert (usual.answer, usual.room, usual.summary) == (512, 1536, 192)
    assert Budget.of(128).room >= Budget.of(128).summary
