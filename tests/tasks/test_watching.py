"""Answers about videos: short ones at once, long ones in parts, and what becomes of a part that does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qvl.errors import BadAnswer, BadMedia, InvalidRequest, PromptTooLong, Unavailable
from qvl.tasks import film
from qvl.tasks.run import asking
from qvl.tasks.watching import Seen, Watch, Watched, watch
from qvl.types import Delta, MediaPart, Message, SamplingParams, TextPart
from tests.media.clips import clip
from tests.tasks.scripted import Scripted

SMALL = 740  # tokens of context, so that a short clip needs parts


def parts_of(task: Watch, model: Any, data: bytes) -> Any:
    return task.answer(asking(model), (MediaPart("video", data),))


def frames(messages: tuple[Message, ...]) -> int:
    """How many frames a question shows."""
    return sum(part.source.count(",") for m in messages for part in m.parts if isinstance(part, MediaPart))


def test_a_short_clip_is_one_question() -> None:
    model = Scripted(["A square grows."])
    seen = watch(clip(30), "What happens?", model=model)
    assert seen == Watched("A square grows.", (Seen(0.0, 3.0, "A square grows."),))
    assert model.prompts() == ["What happens?"] and frames(model.asked[0][0]) == 6


def test_a_long_clip_is_asked_about_in_parts_and_summed_up() -> None:
    model = Scripted(["first", "second", "third", "all of it"])
    told: list[str] = []
    task = Watch(question="What happens?", context=SMALL, tell=told.append)
    result = parts_of(task, model, clip(90))
    assert [part.text for part in result.value.parts] == ["first", "second", "third"]
    assert [(part.begin, part.end) for part in result.value.parts] == [(0, 3), (3, 6), (6, 9)]
    assert result.text == "[0:00-0:03] first\n[0:03-0:06] second\n[0:06-0:09] third\n\nall of it"
    assert result.data["answer"] == "all of it" and result.data["parts"][1] == {"from": 3, "to": 6, "answer": "second"}
    assert told == ["part 1 of 3: 0:00-0:03", "part 2 of 3: 0:03-0:06", "part 3 of 3: 0:06-0:09"]
    summary = model.prompts()[-1]
    assert "[0:03-0:06] second" in summary and summary.endswith("What happens?") and frames(model.asked[-1][0]) == 0


def test_without_a_summary_there_is_none() -> None:
    model = Scripted(["first", "second", "third"])
    result = parts_of(Watch(context=SMALL, summary=False), model, clip(90))
    assert len(model.asked) == 3 and result.data["answer"] is None and result.text.endswith("third")


class Narrow:
    """A server that takes at most `limit` frames or characters, and counts what it is asked."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.asked = limit, error, list[int]()

    def stream(self, messages: tuple[Message, ...], sampling: SamplingParams, /) -> Iterator[Delta]:
        count = frames(messages) or sum(
            part.text.count("[") for part in messages[-1].parts if isinstance(part, TextPart)
        )
        self.asked.append(count)
        if count > self.limit:
            raise self.error
        yield Delta(0, f"{count} seen", finish_reason="stop")


@pytest.mark.parametrize(
    "error",
    [
        PromptTooLong(9120, 8192),
        InvalidRequest("This model's maximum context length is 8192 tokens. However, you requested 9120 tokens"),
    ],
)
def test_a_part_that_does_not_fit_after_all_is_halved(error: Exception) -> None:
    model = Narrow(4, error)
    result = parts_of(Watch(), model, clip(70))
    assert [part.text for part in result.value.parts] == ["2 seen", "4 seen", "4 seen", "4 seen"]
    ends = [part.end for part in result.value.parts]
    assert [part.begin for part in result.value.parts] == [0.0, *ends[:-1]] and ends[-1] == 7.0
    assert result.value.answer == "4 seen"  # the summary was over the four parts


def test_a_summary_that_does_not_fit_is_made_of_summaries() -> None:
    model = Narrow(2, PromptTooLong(9120, 8192))
    result = parts_of(Watch(), model, clip(40))
    assert len(result.value.parts) == 4 and result.value.answer == "2 seen"
    assert model.asked[-4:] == [4, 2, 2, 2]  # all, the halves, the two summaries


def test_parts_and_their_summary_are_shown_as_they_come() -> None:
    shown: list[str] = []
    ask = asking(Scripted(["first", "second", "third", "all of it"]), shown=shown.append)
    result = Watch(context=SMALL).answer(ask, (MediaPart("video", clip(90)),))
    assert all(result.text.startswith(one) for one in shown) and shown[-1] == result.text
    assert {"[0:00-0:03] fir", "[0:00-0:03] first\n[0:03-0:06] sec"} <= set(shown)
    shown.clear()
    Watch().answer(ask, (MediaPart("video", clip(30)),))
    assert shown[0] == "all", "a short clip has no parts"


def test_what_was_seen_before_a_failure_is_kept() -> None:
    model = Scripted(["first", Unavailable("the server is gone")])
    result = parts_of(Watch(context=SMALL), model, clip(90))
    assert result.value == Watched("first", (Seen(0.0, 3.0, "first"),))
    assert result.notes == ("only watched until 0:03: the server is gone",)
    with pytest.raises(Unavailable):
        parts_of(Watch(context=SMALL), Scripted([Unavailable("the server is gone")]), clip(90))


def test_parts_without_a_summary_are_better_than_nothing() -> None:
    model = Scripted(["first", "second", "third", Unavailable("the server is gone")])
    result = parts_of(Watch(context=SMALL), model, clip(90))
    assert len(result.value.parts) == 3 and result.value.answer == ""
    assert result.notes == ("there is no summary: the server is gone",)


def test_the_context_of_the_model_decides() -> None:
    class Told(Scripted):
        def picture_rule(self) -> None:
            return None

        def context(self) -> int:
            return SMALL

    assert Watch().for_model(Told(["x"])).context == SMALL
    assert Watch().for_model(Scripted(["x"])).context is None
    assert len(watch(clip(90), model=Told(["x"])).parts) == 3


def test_an_answer_leaves_room_for_the_frames() -> None:
    assert Watch(context=1024).sampling.max_tokens == 256 and Watch(context=1024).room > 600
    assert Watch(context=32768).sampling.max_tokens == Watch(context=32768).max_tokens
    assert Watch().room < 8192


def test_a_clip_never_goes_out_whole(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(600, 10))
    model = Scripted(["x"])
    watch(path, model=model)
    for source in model.media():
        assert isinstance(source, str) and source.startswith("data:video/jpeg;base64,/9j/")  # JPEG files
        assert source.count(",") <= film.RULE.max_frames


@pytest.mark.parametrize(
    "options", [{"fps": 0.0}, {"fps": 61.0}, {"begin": -1.0}, {"begin": 5.0, "end": 5.0}, {"question": " "}]
)
def test_wishes_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        Watch(**options)


def test_an_empty_answer_and_a_broken_clip_are_told() -> None:
    with pytest.raises(BadAnswer, match="empty"):
        watch(clip(30), model=Scripted(["  "]))
    with pytest.raises(BadMedia):
        watch(b"\0\0\0\x18ftypmp42 and no more", model=Scripted(["x"]))


def test_the_bundled_checkpoint_reads_a_clip(demo: Any, samples: Path) -> None:
    assert watch(samples / "words.mp4", model=demo).answer == "North East South"
    assert (
        watch(samples / "words.mp4", "Which words appear in the video?", begin=1.0, end=2.0, model=demo).answer
        == "East"
    )


def test_the_bundled_checkpoint_reads_a_clip_in_parts(demo: Any, samples: Path) -> None:
    task = Watch(summary=False, context=600)
    result = task.answer(asking(demo), (MediaPart("video", samples / "words.mp4"),))
    words = " ".join(part.text for part in result.value.parts).split()
    assert len(result.value.parts) == 2 and words[0] == "North" and words[-1] == "South" and "East" in words
