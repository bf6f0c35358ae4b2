"""Many items at once: order, bounds, failures, and leaving early. One for a program."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from qvl.errors import BadMedia, Unavailable
from qvl.tasks import Describe, Ocr, ReadTable, Solve, Task, Translate, each, ocr
from qvl.tasks import run as module
from qvl.tasks.base import CUT
from qvl.tasks.inputs import Item, Reading, items
from qvl.tasks.run import run
from qvl.types import Delta, Message, SamplingParams, TextPart, Usage
from tests.tasks import documents
from tests.tasks.scripted import Messages, Scripted

if TYPE_CHECKING:
    from qvl import LLM

WAIT = 60.0


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    return paths


class Gated:
    """Answers with the picture's name once its gate is open; knows how many were asked at a time."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.lock = threading.Lock()
        self.running = self.most = self.begun = 0
        self.all_open = False
        self.ended = threading.Event()

    def stream(self, messages: Messages, sampling: SamplingParams, /) -> Iterator[Delta]:
        name = messages[-1].parts[0].source.stem  # type: ignore[union-attr]
        with self.lock:
            self.running += 1
            self.begun += 1
            self.most = max(self.most, self.running)
            gate = self.gates.setdefault(name, threading.Event())
        try:
            yield Delta(0, name)
            assert self.all_open or gate.wait(WAIT)
            yield Delta(0, "", (), None, "stop", None, Usage())
        finally:
            with self.lock:
                self.running -= 1
            self.ended.set()


def test_order_is_kept_whatever_is_ready_first(pictures: list[Path]) -> None:
    model = Gated()
    with model.lock:
        model.gates["0"] = threading.Event()
    model.gates.update({str(i): threading.Event() for i in range(1, 12)})
    for i in range(1, 12):
        model.gates[str(i)].set()
    outcomes = each(Ocr(), *pictures, model=model, concurrency=3)
    threading.Timer(0.2, model.gates["0"].set).start()
    assert [outcome.result.value for outcome in outcomes if outcome.result] == [str(i) for i in range(12)]
    assert model.most <= 3


def test_no_more_than_asked_for_at_a_time(pictures: list[Path]) -> None:
    model = Gated()
    model.all_open = True
    assert len(list(each(Ocr(), *pictures, model=model, concurrency=1))) == 12
    assert model.most == 1


def test_a_failing_one_does_not_lose_the_others(pictures: list[Path], tmp_path: Path) -> None:
    model = Scripted(["one", BadMedia("no picture"), "three"])
    outcomes = list(
        each(Ocr(), pictures[0], pictures[1], tmp_path / "nope.png", pictures[2], model=model, concurrency=1)
    )
    assert [outcome.result and outcome.result.value for outcome in outcomes] == ["one", None, None, "three"]
    assert [outcome.error and outcome.error.code for outcome in outcomes] == [
        None,
        "invalid_media",
        "invalid_value",
        None,
    ]


def test_a_fault_of_ours_is_not_hidden(pictures: list[Path]) -> None:
    def broken(messages: tuple[Message, ...]) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(each(Ocr(), pictures[0], model=Scripted([broken])))


def test_items_are_not_read_far_ahead(pictures: list[Path]) -> None:
    """A folder of a million pictures is not held in memory."""
    model = Gated()
    taken: list[str] = []

    def found() -> Iterator[Item]:
        for item in items([*pictures, *pictures, *pictures], Reading()):
            taken.append(item.file)
            yield item

    model.gates.update({str(i): threading.Event() for i in range(12)})
    model.gates["0"].set()
    outcomes = run(Ocr(), found(), model, concurrency=2)
    next(outcomes)
    assert len(taken) <= 2 * module.AHEAD
    model.all_open = True
    for gate in model.gates.values():
        gate.set()
    assert len(list(outcomes)) == 35


def test_leaving_early_ends_what_is_under_way(pictures: list[Path]) -> None:
    model = Gated()
    model.gates.update({str(i): threading.Event() for i in range(12)})
    model.gates["0"].set()
    outcomes = run(Ocr(), each_item(pictures), model, concurrency=2)
    assert next(outcomes).result is not None
    model.ended.clear()
    threading.Timer(0.2, model.gates["1"].set).start()
    outcomes.close()
    assert model.ended.wait(WAIT)
    assert model.begun < 12


def each_item(pictures: list[Path]) -> list[Item]:
    return items(pictures, Reading())


def test_what_is_to_be_known_is_a_warning(pictures: list[Path]) -> None:
    with pytest.warns(UserWarning, match="cut at its length") as told:
        assert ocr(pictures[0], model=Scripted(["begin"], "length")) == "begin"
    assert [str(warning.message) for warning in told] == [CUT]
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ocr(pictures[0], model=Scripted(["all"])) == "all"


def test_an_error_is_raised_for_one(pictures: list[Path]) -> None:
    with pytest.raises(Unavailable, match="gone"):
        ocr(pictures[0], model=Scripted([Unavailable("gone")]))


def test_pages_of_a_pdf_by_the_bundled_checkpoint(demo: LLM, tmp_path: Path) -> None:
    """Drawn at the size that it sees."""
    path = tmp_path / "letters.pdf"
    path.write_bytes(documents.pdf_of([documents.printed("Room 204"), documents.printed("OPEN\ntoday")]))
    outcomes = list(each(Ocr(), path, model=demo, concurrency=2))
    assert [(o.item.page, o.result.value) for o in outcomes if o.result] == [(1, "Room 204"), (2, "OPEN\ntoday")]
    assert [o.item.page for o in each(Ocr(), path, model=demo, pages="2")] == [2]
    assert ocr(path, page=1, model=demo) == "Room 204"


def test_without_a_server_the_bundled_checkpoint_answers(
    demo: LLM, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QVL_BASE_URL", raising=False)
    monkeypatch.setattr(module, "DEFAULT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(module, "_bundled", lambda: demo)
    assert ocr(samples / "open.png") == "OPEN\n8 to 17"
    monkeypatch.setenv("QVL_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="no server answers"):
        ocr(samples / "open.png")


STEPS = "First.\n\n```\n1 + 1\n```\n\n\\boxed{2}"


@pytest.mark.parametrize(
    "task, answer, text",
    [
        (Ocr(), "OPEN  \n8 to 17 \n", "OPEN\n8 to 17"),
        (Ocr(), "```text\nOPEN\n8 to 17\n```", "OPEN\n8 to 17"),
        (Translate(to="fr"), " Bonjour le monde\n\n", "Bonjour le monde"),
        (Describe(), "Two dogs  \nand `a cat`\n", "Two dogs  \nand `a cat`"),
        (Solve(), f"\n{STEPS}\n", STEPS),
    ],
)
def test_what_is_shown_of_an_answer_stays(task: Task[str], answer: str, text: str, pictures: list[Path]) -> None:
    shown: list[str] = []
    (outcome,) = run(task, items([pictures[0]], Reading()), Scripted([answer]), shown=shown.append)
    assert outcome.result is not None and outcome.result.text == text
    seen = [one for one in shown if one]
    assert len(set(seen)) > 2, "it comes in pieces"
    assert all(text.startswith(one) for one in seen)
    assert seen == sorted(seen, key=len), "nothing is taken back"
    assert text.removeprefix(seen[-1]).strip("` \n") == ""


@pytest.mark.parametrize("task", [ReadTable(), Solve(answer_only=True)])
def test_what_only_a_whole_answer_tells_is_not_shown(task: Task[str], pictures: list[Path]) -> None:
    shown: list[str] = []
    answer = "| a | b |\n| --- | --- |\n| 1 | \\boxed{2} |"
    (outcome,) = run(task, items([pictures[0]], Reading()), Scripted([answer]), shown=shown.append)
    assert outcome.result is not None and not any(shown)


def test_a_long_text_is_shown_across_its_questions() -> None:
    """Each part of a translation follows those that are done."""
    text = TextPart("\n\n".join(["Hallo" + " Welt." * 400] * 2))
    model = Scripted(["Hello world.", "```\nGood bye.\n```"])
    shown: list[str] = []
    (outcome,) = run(Translate(), [Item("-", lambda: text)], model, shown=shown.append)
    assert outcome.result is not None and outcome.result.text == "Hello world.\n\nGood bye."
    assert all(outcome.result.text.startswith(one) for one in shown)
    assert "Hello world.\n\nGood" in shown and "Hello world.\n\nGood bye." in shown
