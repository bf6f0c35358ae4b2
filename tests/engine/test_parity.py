"""Greedy answers of 64 tokens, identical to transformers', on three configurations in which every dimension differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qvl.engine.engine import Engine
from qvl.engine.intake import Intake
from qvl.engine.messages import read_dialogue
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, SamplingParams
from tests.checkpoints import VARIANTS
from tests.engine.harness import Outcome, make_engine
from tests.engine.oracle import Dialogue, assistant, oracle, picture, user

LENGTH = 64


def dialogues() -> dict[str, Dialogue]:
    """Eight conversations; those named alike are turns of one, whose pictures and answers come again."""
    first = [user(picture(1, 90, 130), "What is this?")]
    other = [user("Look at these.", picture(2, 56, 56), picture(3, 210, 60), "Which is larger?")]
    return {
        "text": [user("The quick brown fox. 你好，世界！")],
        "system": [{"role": "system", "content": "Answer in one word."}, user("It's 12.50 + 7.25")],
        "picture": first,
        "pictures": [user(picture(4, 300, 200), "and", picture(5, 29, 31), picture(6, 57, 500), "compare them")],
        "video": [user([picture(7 + i, 84, 112) for i in range(5)], "What happens?")],
        "first, second turn": [*first, assistant("A red square."), user("And the second line?")],
        "other": other,
        "other, second turn": [*other, assistant("The first one."), user(picture(1, 90, 130), "Is it this one?")],
    }


@pytest.fixture(scope="module", params=range(len(VARIANTS)), ids=VARIANTS)
def folder(request: pytest.FixtureRequest, checkpoints: tuple[Path, ...]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, list[int]]:
    return {name: oracle(folder).greedy(dialogue, LENGTH) for name, dialogue in dialogues().items()}


def submit(engine: Engine, intake: Intake, name: str, dialogue: Dialogue) -> list[int]:
    """Hand a conversation to the engine as the front ends do; its prompt."""
    sampling = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
    prepared = intake.prepare_chat(ChatRequest(read_dialogue(dialogue), sampling))
    request = prepared.request(name)
    engine.add(request, [media.pixels for media in prepared.media])
    return request.token_ids


def serve(engine: Engine, names: list[str]) -> dict[str, list[int]]:
    """All of `names` at once."""
    config = engine.config
    intake = Intake(config, Tokenizer.from_folder(config.spec.folder, config.spec.ids))
    known = dialogues()
    for name in names:
        submit(engine, intake, name, known[name])
    outcomes = {name: Outcome() for name in names}
    while engine.has_work:
        for output in engine.step():
            outcomes[output.request_id].take(output)
        engine.check_integrity()
    return {name: outcome.token_ids for name, outcome in outcomes.items()}


def test_prompts_are_the_references(folder: Path) -> None:
    engine = make_engine(folder)
    intake = Intake(engine.config, Tokenizer.from_folder(folder, engine.config.spec.ids))
    for name, dialogue in dialogues().items():
        assert submit(engine, intake, name, dialogue) == oracle(folder).inputs(dialogue)["input_ids"][0].tolist(), name


def test_one_at_a_time(folder: Path, answers: dict[str, list[int]]) -> None:
    engine = make_engine(folder)
    for name, want in answers.items():
        assert serve(engine, [name]) == {name: want}
    assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize(("chunk", "prefix_caching"), [(64, True), (64, False), (23, True)])
def test_eight_at_once_in_a_cache_that_holds_two(
    folder: Path, answers: dict[str, list[int]], chunk: int, prefix_caching: bool
) -> None:
    options: dict[str, Any] = {"max_num_batched_tokens": chunk, "enable_prefix_caching": prefix_caching}
    engine = make_engine(folder, max_model_len=256, block_size=8, num_blocks=40, max_num_seqs=8, **options)
    assert serve(engine, list(answers)) == answers
    assert engine.stats().preemptions > 0


def test_two_conversations_turn_by_turn(folder: Path, answers: dict[str, list[int]]) -> None:
    """Positions and cached blocks of one conversation stay out of the other."""
    engine = make_engine(folder)
    for names in (["picture", "other"], ["first, second turn", "other, second turn"], ["other", "picture"]):
        assert serve(engine, names) == {name: answers[name] for name in names}
    assert engine.stats().encoder_hits + engine.stats().prefix_hit_tokens > 0
