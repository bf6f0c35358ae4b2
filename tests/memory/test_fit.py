"""The machine: whatever is said, counted or answered, a request fits, and every turn is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qvl.engine.config import DeviceFacts, EngineOptions, resolve
from qvl.engine.intake import Intake
from qvl.errors import BadMedia, InvalidRequest, PromptTooLong, RequestFailed, TooManyMedia, Unavailable
from qvl.memory import Budget, Fitted, Measured, Running, Strategy, adrive, drive, fit
from qvl.memory.folding import MOST_FOLDS
from qvl.memory.steps import Messages
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, Completion, MediaPart, Message, SamplingParams, TextPart
from tests.memory.scripted import (
    PICTURE_TOKENS,
    Model,
    completion,
    media_of,
    picture,
    said,
    text_of,
    user,
    words_counted,
)


def long_talk(turns: int, words: int = 10, *, pictures: bool = False) -> list[Message]:
    """`turns` answered questions and one that is not; turn i says "q<i>" and shows the picture p<i>."""
    messages = []
    for i in range(turns + 1):
        messages.append(user(*([picture(f"p{i}")] if pictures else []), " ".join([f"q{i}"] * words)))
        messages.append(said(" ".join([f"a{i}"] * words)))
    return messages[:-1]


def run(messages: list[Message], budget: Budget, model: Model, **more: object) -> Fitted:
    return drive(fit(messages, budget, **more), model.count, model.ask)  # type: ignore[arg-type]


# The property: any conversation, any counter (sums that do not add up included), any behaviour of the summariser.

parts = st.lists(
    st.integers(0, 30).map(lambda n: TextPart("w " * n)) | st.integers(0, 99).map(lambda n: picture(f"p{n}")),
    min_size=1,
    max_size=3,
)
turn = st.builds(
    lambda role, content: Message(role, tuple(content)),  # type: ignore[arg-type]
    st.sampled_from(["user", "assistant", "user", "assistant", "tool", "system"]),
    parts,
)
talks = st.lists(turn, max_size=24).map(lambda turns: [*turns, user("newest question")])


def uneven(shift: int) -> Callable[[Messages], int]:
    """A counter whose whole is not the sum of its parts: the more messages, the more each of them gives or takes."""
    return lambda messages: max(1, words_counted(messages) + shift * len(messages) ** 2 // 10)


def summariser(behaviour: str) -> Callable[[Messages], Completion | Exception]:
    made: dict[str, Completion | Exception] = {
        "good": completion("They talked about w."),
        "empty": completion("  "),
        "long": completion("w " * 5000),
        "cut": completion("w w w", reason="length"),
        "down": Unavailable("nobody there"),
        "timeout": TimeoutError("too slow"),
    }
    return lambda messages: made[behaviour]


@settings(max_examples=400, deadline=None)
@given(
    talk=talks,
    room=st.integers(80, 500),
    strategy=st.sampled_from(["summary", "window"]),
    shift=st.integers(-3, 3),
    behaviour=st.sampled_from(["good", "empty", "long", "cut", "down", "timeout"]),
    server_takes=st.none() | st.integers(0, 4),
    max_media=st.none() | st.integers(0, 4),
    covers=st.integers(0, 20),
)
def test_a_request_never_exceeds_the_budget_and_every_turn_is_accounted_for(
    talk: list[Message],
    room: int,
    strategy: Strategy,
    shift: int,
    behaviour: str,
    server_takes: int | None,
    max_media: int | None,
    covers: int,
) -> None:
    budget = Budget(room + 100, 100, 64, max_media)
    even = uneven(shift)

    def count(messages: Messages) -> int:
        if server_takes is not None and len(media_of(messages)) > server_takes:
            raise TooManyMedia("image", len(media_of(messages)), server_takes)
        return even(messages)

    model = Model(budget.tokens, count, summarise=summariser(behaviour))
    running = Running("Earlier.", covers, 20) if covers else None
    pinned = tuple(message for message in talk if message.role == "system")
    least = [*pinned, talk[-1]]
    try:
        fitted = drive(fit(talk, budget, strategy=strategy, running=running), count, model.ask)
    except PromptTooLong:
        assert even(tuple(least)) > room, "only what must stay may be too long"
        return
    except TooManyMedia:
        assert server_takes is not None
        assert len(media_of(least)) > server_takes
        return
    assert even(fitted.messages) == fitted.num_tokens <= room
    assert tuple(message for message in fitted.messages if message.role == "system") == pinned
    assert text_of(fitted.messages[-1]).endswith("newest question")
    _check_accounts(talk, fitted, strategy, covers)


def _borders(talk: list[Message], turns: list[int], covers: int) -> set[int]:
    """Where a request may begin: with the first turn of an exchange, with the first that no summary covers, and between
    questions in a row that nobody has answered yet."""
    pairs = zip([None, *turns], turns, strict=False)
    users = {i for before, i in pairs if talk[i].role == "user" and (before is None or talk[before].role != "user")}
    unanswered = set()
    for index in reversed(turns):
        if talk[index].role != "user":
            break
        unanswered.add(index)
    uncovered = next((index for index in turns if index >= covers), turns[-1])
    return {turns[0], uncovered, *users, *unanswered}


def _check_accounts(talk: list[Message], fitted: Fitted, strategy: Strategy, covers: int) -> None:
    """Turns are sent as a suffix of the talk; the others are in the summary or in a notice that says "dropped"."""
    turns = [index for index, message in enumerate(talk) if message.role != "system"]
    sent = [message for message in fitted.messages if message.role != "system"]
    kept = turns[len(turns) - len(sent) :]
    assert kept[0] in _borders(talk, turns, covers), "a question and its answers are not parted"
    for number, (message, index) in enumerate(zip(sent, kept, strict=True)):
        assert media_of([message]) == media_of([talk[index]])
        same = text_of(message) == text_of(talk[index])
        assert same or (text_of(message).endswith(text_of(talk[index])) and number <= len(kept))
    summarised = "[Summary of the conversation so far]" in "".join(map(text_of, sent))
    covered = fitted.running.covers if summarised and fitted.running else 0
    assert not (strategy == "window" and summarised)
    dropped = [notice for notice in fitted.notices if notice.kind == "dropped"]
    gone = [index for index in turns if index not in kept and index >= covered]
    assert len(dropped) == bool(gone)
    if gone:
        assert (dropped[0].first, dropped[0].end) == (min(gone), max(gone) + 1)
        assert dropped[0].media == len(media_of([talk[index] for index in gone]))


# The same with the tokens of a real checkpoint and real pictures: no sum of parts, no arithmetic of ours.

words = st.text("ab 世\n<|>🙂", max_size=60).map(TextPart)
sized = st.tuples(st.integers(1, 400), st.integers(1, 400)).filter(lambda size: max(size) < 150 * min(size))
shown = sized.map(lambda size: MediaPart("image", Image.new("RGB", size)))
real_turn = st.builds(
    lambda role, content: Message(role, tuple(content)),  # type: ignore[arg-type]
    st.sampled_from(["user", "assistant", "user", "assistant", "system"]),
    st.lists(words | shown, min_size=1, max_size=3),
)


@pytest.fixture(scope="module")
def intake(checkpoint: Path) -> Intake:
    options = {"model": str(checkpoint), "max_model_len": 900, "limit_mm_per_prompt": "image=6"}
    config = resolve(EngineOptions.from_dict(options), DeviceFacts("cpu", (0, 0), 8 << 30, "float32", 1))
    return Intake(config, Tokenizer.from_folder(config.spec.folder, config.spec.ids))


def _too_much(intake: Intake, messages: Messages, budget: Budget) -> bool:
    try:
        return len(intake.prepare_chat(ChatRequest(messages)).prompt.token_ids) > budget.room
    except (PromptTooLong, TooManyMedia):
        return True


@settings(max_examples=60, deadline=None)
@given(talk=st.lists(real_turn, max_size=16), strategy=st.sampled_from(["summary", "window"]))
def test_real_tokens_never_exceed_the_budget(intake: Intake, talk: list[Message], strategy: Strategy) -> None:
    def count(messages: Messages) -> int:
        return len(intake.prepare_chat(ChatRequest(messages)).prompt.token_ids)

    budget = Budget.of(900)
    talk = [*talk, user(MediaPart("image", Image.new("RGB", (80, 60))), "newest question")]
    model = Model(900, count)
    pinned = tuple(message for message in talk if message.role == "system")
    try:
        fitted = drive(fit(talk, budget, strategy=strategy), count, model.ask)
    except (PromptTooLong, TooManyMedia):
        assert _too_much(intake, (*pinned, talk[-1]), budget), "only what must stay may be too much"
        return
    assert count(fitted.messages) == fitted.num_tokens <= budget.room
    assert len(media_of(fitted.messages)) <= 6
    assert text_of(fitted.messages[-1]).endswith("newest question")
    assert tuple(message for message in fitted.messages if message.role == "system") == pinned
    _check_accounts(talk, fitted, strategy, 0)


# Examples


@pytest.mark.parametrize("strategy", ["summary", "window"])
def test_a_whole_above_the_sum_of_its_parts_is_seen(strategy: Strategy) -> None:
    talk, count = long_talk(40, 2), uneven(2)
    fitted = run(talk, Budget.of(1000), Model(1000, count), strategy=strategy)
    assert count(fitted.messages) == fitted.num_tokens <= Budget.of(1000).room
    assert len(fitted.messages) > 20


def test_everything_goes_verbatim_while_it_fits() -> None:
    talk = long_talk(3)
    model = Model(2048)
    fitted = run(talk, Budget.of(2048), model)
    assert fitted.messages == tuple(talk)
    assert (fitted.notices, fitted.running, model.summaries) == ((), None, [])
    assert fitted.num_tokens == words_counted(tuple(talk))


def test_the_summary_stands_before_the_first_turn_that_stays() -> None:
    talk = [said("Be brief.", "system"), *long_talk(40)]
    model = Model(1000, summarise=lambda messages: completion("Fruit was discussed."))
    fitted = run(talk, Budget.of(1000), model)
    assert fitted.messages[0] == talk[0]
    opening, *rest = fitted.messages[1:]
    assert opening.role == "user"
    assert "Fruit was discussed." in text_of(opening)
    assert tuple(rest) == tuple(talk[len(talk) - len(rest) :])
    assert fitted.running is not None
    assert fitted.running.covers == len(talk) - len(rest) - 1
    (notice,) = fitted.notices
    assert (notice.kind, notice.first, notice.end) == ("summarised", 1, fitted.running.covers)
    assert str(notice).startswith("turns 1 to ")


def test_the_running_summary_is_merged_not_repeated() -> None:
    """The second fold gets the first summary and only the turns after it, and pictures keep their numbers."""
    budget, measured = Budget.of(700), Measured()
    model = Model(700, summarise=lambda messages: completion(f"Summary {len(model.summaries)}."))
    talk = long_talk(12, 4, pictures=True)
    first = run(talk, budget, model, measured=measured).running
    assert first is not None
    folded_before = len(model.summaries)
    grown = [*talk, said("a12"), *long_talk(8, 4, pictures=True)]
    second = run(grown, budget, model, running=first, measured=measured).running
    assert second is not None
    assert second.covers > first.covers
    request = model.summaries[folded_before]
    asked = text_of(request[1])
    assert first.text in asked
    assert "[Picture 1]" not in asked
    number = len(media_of(talk[: first.covers])) + 1
    assert f"[Picture {number}]" in asked
    assert media_of(request)[0] == media_of(grown[first.covers :])[0]


def test_more_leaves_at_a_time_than_must_so_that_requests_begin_alike() -> None:
    """A prefix cache finds what begins alike: of 60 requests most begin with the same turn as the one before."""
    budget, measured = Budget.of(1000), Measured()
    talk: list[Message] = []
    firsts = []
    for i in range(60):
        talk.append(user(" ".join([f"q{i}"] * 10)))
        fitted = run(talk, budget, Model(1000), strategy="window", measured=measured)
        firsts.append(talk.index(fitted.messages[0]))
        assert fitted.num_tokens > budget.room * 0.7 or firsts[-1] == 0
        talk.append(said(" ".join([f"a{i}"] * 10)))
    assert firsts == sorted(firsts), "what has left does not come back"
    assert 2 <= len(set(firsts)) <= 15
    assert run(talk[:-1], budget, Model(1000), strategy="window", measured=Measured(cut=2)).num_tokens <= budget.room
    short = run([*talk[:40], user("q")], budget, Model(1000), strategy="window", measured=measured)
    assert short.num_tokens > budget.room * 0.6, "after an undo the window fills up again"


def test_between_folds_the_model_is_not_asked() -> None:
    budget, measured, running = Budget.of(1000), Measured(), None
    model = Model(1000)
    talk: list[Message] = []
    for i in range(60):
        talk.append(user(" ".join([f"q{i}"] * 10)))
        fitted = run(talk, budget, model, running=running, measured=measured)
        running = fitted.running
        talk.append(said(" ".join([f"a{i}"] * 10)))
    assert 3 <= len(model.summaries) <= 12


def test_counting_costs_the_same_at_the_hundredth_turn() -> None:
    """Every exchange is counted once; a long conversation is not counted again."""
    calls: list[int] = []

    def count(messages: Messages) -> int:
        calls.append(len(messages))
        return words_counted(messages)

    budget, measured = Budget.of(1000), Measured()
    model = Model(1000, count)
    talk: list[Message] = []
    counts = []
    for i in range(100):
        talk.append(user(" ".join([f"q{i}"] * 10)))
        calls.clear()
        run(talk, budget, model, strategy="window", measured=measured)
        counts.append(len(calls))
        talk.append(said(" ".join([f"a{i}"] * 10)))
    assert max(counts[50:]) <= 3


def test_a_late_reader_counts_only_what_could_fit() -> None:
    calls: list[Messages] = []

    def count(messages: Messages) -> int:
        calls.append(messages)
        return words_counted(messages)

    run(long_talk(500), Budget.of(1000), Model(1000, count), strategy="window")
    assert len(calls) < 40


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (completion("w " * 500), "over-long"),
        (completion("half a sum", reason="length"), "over-long"),
        (completion(""), "empty"),
        (completion("x", reason="abort"), "abort"),
        (RequestFailed("logits are not numbers"), "not numbers"),
        (ConnectionResetError("reset by peer"), "reset by peer"),
    ],
)
def test_a_failing_summary_falls_back_to_the_window_and_says_so(made: Completion | Exception, says: str) -> None:
    talk = long_talk(40)
    model = Model(1000, summarise=lambda messages: made)
    fitted = run(talk, Budget.of(1000), model)
    assert [notice.kind for notice in fitted.notices] == ["summary_failed", "dropped"]
    assert says in fitted.notices[0].reason
    assert says in str(fitted.notices[0])
    assert fitted.running is None
    assert fitted.messages == tuple(talk[len(talk) - len(fitted.messages) :])
    window = run(talk, Budget.of(1000), model, strategy="window")
    assert fitted.messages == window.messages
    assert len(model.summaries) == 1, "one failure is enough"


def test_a_failing_summary_keeps_the_one_that_was_there() -> None:
    talk = long_talk(40)
    model = Model(1000, summarise=lambda messages: Unavailable("gone"))
    running = Running("Apples, mostly.", 20, 12)
    fitted = run(talk, Budget.of(1000), model, running=running)
    assert fitted.running is running
    assert "Apples, mostly." in text_of(fitted.messages[0])
    dropped = next(notice for notice in fitted.notices if notice.kind == "dropped")
    assert dropped.first == 20


def test_a_bug_in_the_caller_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError):
        run(long_talk(40), Budget.of(1000), Model(1000, summarise=lambda messages: ZeroDivisionError("bug")))


def test_a_backlog_is_folded_in_several_calls_that_each_fit() -> None:
    talk = long_talk(300)
    model = Model(1000, summarise=lambda messages: completion(f"Up to {text_of(messages[1]).split()[-10]}."))
    fitted = run(talk, Budget.of(1000), model)
    assert 1 < len(model.summaries) <= MOST_FOLDS
    assert fitted.running is not None
    again = run(talk, Budget.of(1000), model, running=fitted.running)
    assert again.running is not None
    assert again.running.covers > fitted.running.covers


def test_a_turn_too_large_for_a_summary_goes_without_pictures_then_shortened() -> None:
    talk = [user(*[picture(f"p{i}") for i in range(30)], "small"), said("ok"), *long_talk(30)]
    model = Model(1000)
    run(talk, Budget.of(1000), model)
    assert media_of(model.summaries[0]) == []
    assert "[Picture 30, not shown here]" in text_of(model.summaries[0][1])
    talk = [user("start " + "w " * 3000 + "end"), said("ok"), *long_talk(30)]
    model = Model(1000)
    fitted = run(talk, Budget.of(1000), model)
    asked = text_of(model.summaries[0][1])
    assert "start" in asked
    assert "end" in asked
    assert " […] " in asked
    assert fitted.running is not None


def test_the_newest_turn_alone_too_long() -> None:
    with pytest.raises(PromptTooLong, match=r"The newest turn and the system message alone take 507; .* leaves 300"):
        run([*long_talk(3), said("a"), user("w " * 500)], Budget(400, 100, 64), Model(400))


def test_of_user_turns_in_a_row_only_the_newest_must_stay() -> None:
    talk = [user("old " * 200), user("new " * 50)]
    fitted = run(talk, Budget(300, 100, 64), Model(300), strategy="window")
    assert fitted.messages == (talk[1],)
    both = run([user("old " * 50), user("new " * 50)], Budget(300, 100, 64), Model(300), strategy="window")
    assert len(both.messages) == 2


def test_the_number_of_pictures_that_a_server_takes_is_learnt() -> None:
    refused: list[int] = []

    def count(messages: Messages) -> int:
        if len(media_of(messages)) > 4:
            refused.append(len(media_of(messages)))
            raise TooManyMedia("image", len(media_of(messages)), 4)
        return words_counted(messages)

    talk, measured = long_talk(9, pictures=True), Measured()
    model = Model(4000, count)
    fitted = run(talk, Budget.of(4000), model, measured=measured, strategy="window")
    assert media_of(fitted.messages) == ["p7", "p8", "p9"]
    assert (measured.max_media, refused) == (4, [10])
    refused.clear()
    grown = [*talk, said("a9"), *long_talk(0, pictures=True)]
    assert media_of(run(grown, Budget.of(4000), model, measured=measured, strategy="window").messages)[0] == "p7"
    assert refused == []
    with pytest.raises(TooManyMedia):
        run([user(*[picture(str(i)) for i in range(5)])], Budget.of(4000), model)


def test_a_limit_of_pictures_folds_too() -> None:
    talk = long_talk(9, pictures=True)
    model = Model(4000)
    fitted = run(talk, Budget(4000, 500, 200, 4), model)
    assert 1 <= len(media_of(fitted.messages)) <= 4
    assert fitted.running is not None
    assert [notice.kind for notice in fitted.notices] == ["summarised"]
    assert all(len(media_of(request)) <= 4 for request in model.summaries)


def test_an_old_picture_that_is_gone_leaves_and_the_talk_goes_on() -> None:
    def count(messages: Messages) -> int:
        if "p2" in media_of(messages):
            raise BadMedia("the file is gone")
        return words_counted(messages)

    talk = long_talk(6, pictures=True)
    fitted = run(talk, Budget.of(2000), Model(2000, count), strategy="window")
    assert media_of(fitted.messages) == ["p3", "p4", "p5", "p6"]
    model = Model(2000, count)
    fitted = run(talk, Budget.of(2000), model)
    assert fitted.running is not None
    assert all("p2" not in media_of(request) for request in model.summaries)
    assert any("[Picture 3, not shown here]" in text_of(request[1]) for request in model.summaries)


def test_none_sends_all_or_refuses() -> None:
    talk = long_talk(10)
    assert run(talk, Budget.of(2000), Model(2000), strategy="none").messages == tuple(talk)
    with pytest.raises(PromptTooLong, match="strategy summary or window"):
        run(talk, Budget(300, 60, 64), Model(300), strategy="none")


def test_system_messages_alone_are_a_request() -> None:
    talk = [said("a", "system"), said("b", "system")]
    fitted = run(talk, Budget.of(1000), Model(1000), running=Running("Old.", 1, 5))
    assert fitted.messages == tuple(talk)


def test_nothing_to_fit() -> None:
    with pytest.raises(InvalidRequest, match="must not be empty"):
        drive(fit([], Budget.of(1000)), words_counted, Model(1000).ask)


def test_a_summary_of_another_past_is_not_used() -> None:
    talk = long_talk(2)
    fitted = run(talk, Budget.of(1000), Model(1000), running=Running("Not ours.", 99, 10))
    assert fitted.messages == tuple(talk)


async def test_the_awaited_loop_does_the_same() -> None:
    talk = long_talk(40, pictures=True)
    here, there = Model(1000), Model(1000)

    async def count(messages: Messages) -> int:
        return there.count(messages)

    async def ask(messages: Messages, sampling: SamplingParams) -> Completion:
        return there.ask(messages, sampling)

    assert await adrive(fit(talk, Budget.of(1000)), count, ask) == run(talk, Budget.of(1000), here)
    assert here.summaries == there.summaries
    with pytest.raises(PromptTooLong):
        await adrive(fit([user("w " * 999)], Budget.of(1000)), count, ask)


def test_chinese_conversations_are_summarised_in_chinese() -> None:
    talk = [user("今天天气怎么样？" * 6 + str(i)) if i % 2 == 0 else said("晴，二十度。" * 6) for i in range(41)]
    model = Model(600, lambda messages: sum(4 + len(text_of(message)) for message in messages))
    model.summarise = lambda messages: completion("用户问天气，助手说晴。")
    fitted = run(talk, Budget.of(600), model)
    assert "你负责维护" in text_of(model.summaries[0][0])
    assert "用户：" in text_of(model.summaries[0][1])
    assert text_of(fitted.messages[0]).startswith("【此前对话的摘要】\n用户问天气，助手说晴。")


def test_pictures_weigh_what_they_weigh() -> None:
    assert words_counted((user(picture("p")),)) - words_counted((user(),)) == PICTURE_TOKENS
    assert isinstance(picture("p"), MediaPart)
