"""Answers that must keep to something, from a model of random weights that would never do so by itself."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pydantic_core
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qvl.engine import masks
from qvl.engine.grammar import AnswerGrammar, Grammars, Matcher, token_words
from qvl.engine.llm import LLM
from qvl.engine.sampler import unpack_bits
from qvl.errors import InvalidRequest, RequestFailed
from qvl.specs import load_spec
from qvl.types import Answer, Constraint, SamplingParams
from tests.engine.harness import Ask, greedy, make_engine, run, words

QUESTION = [{"role": "user", "content": "Say something."}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "日本"]}, "maxItems": 3},
        "address": {"type": ["object", "null"], "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32", device="cpu", num_threads=1, num_blocks=512, max_model_len=2048)


@pytest.fixture(autouse=True)
def _idle_and_whole(llm: LLM) -> Any:
    yield
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def held(constraint: Constraint | None, seed: int = 0, **changes: Any) -> SamplingParams:
    usual: dict[str, Any] = {"max_tokens": 400, "temperature": 1.0, "seed": seed}
    return SamplingParams(**{**usual, **changes}, constraint=constraint)


def ask(llm: LLM, constraint: Constraint, seed: int = 0, **changes: Any) -> Answer:
    return llm.chat("Say something.", held(constraint, seed, **changes)).answers[0]


# -- what is asked for is what comes


def test_a_schema_is_kept_to(llm: LLM) -> None:
    completion = llm.chat("Who?", held(Constraint.json(PERSON), n=6))
    ended = [answer for answer in completion.answers if answer.finish_reason == "stop"]
    assert len(ended) >= 3
    for answer in ended:
        jsonschema.validate(json.loads(answer.text), PERSON)
    assert len({answer.text for answer in ended}) == len(ended), "each of n answers goes its own way"


SCALARS = st.sampled_from(
    [
        {"type": "string", "maxLength": 5},
        {"type": "string", "minLength": 2, "maxLength": 4, "pattern": "^[a-z]+$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": -5, "maximum": 300},
        {"type": "integer", "exclusiveMinimum": 10, "multipleOf": 5, "maximum": 1000},
        {"type": "boolean"},
        {"type": "null"},
        {"const": {"a": [1, None]}},
        {"enum": ["red", 'qu"ote\\', 3, None, "ünï😀"]},
    ]
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def build(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
        required = list(properties)[:num_required]
        return {
            "type": "object", "properties": properties, "required": required, "additionalProperties": False,
        }  # fmt: skip

    names = st.sampled_from(["a", "b c", "naïve", 'q"', "z_1"])
    return st.builds(build, st.dictionaries(names, inner, max_size=3), st.integers(0, 3))


def compounds(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def array(items: Any, low: int) -> dict[str, Any]:
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}

    arrays = st.builds(array, inner, st.integers(0, 2))
    unions = st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3))
    return st.one_of(objects(inner), arrays, unions)


@settings(max_examples=40, deadline=None)
@given(schema=st.recursive(SCALARS, compounds, max_leaves=6), seed=st.integers(0, 1000))
def test_any_schema_is_kept_to(llm: LLM, schema: Any, seed: int) -> None:
    answer = ask(llm, Constraint.json(schema), seed)
    if answer.finish_reason == "stop":
        jsonschema.validate(json.loads(answer.text), schema)
    else:
        assert answer.finish_reason == "length"
        pydantic_core.from_json(answer.text, allow_partial="trailing-strings")


@pytest.mark.parametrize("seed", range(6))
def test_any_object_ends_or_is_the_beginning_of_one(llm: LLM, seed: int) -> None:
    answer = ask(llm, Constraint.json(), seed, max_tokens=60)
    assert len(answer.token_ids) <= 60
    assert answer.text.startswith("{")
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.text), dict)
    else:
        pydantic_core.from_json(answer.text.rstrip("\ufffd"), allow_partial="trailing-strings")


def test_blanks_come_to_an_end(llm: LLM) -> None:
    """A model that wants nothing but blanks gets one short run of them between two parts."""
    spell = llm.tokenizer.token_bytes
    blanks = {id: 100.0 for id in range(llm.tokenizer.vocab_size) if re.fullmatch(rb"[ \t\r\n]+", spell(id))}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = ask(llm, Constraint.json(schema), logit_bias=blanks)
    assert answer.finish_reason == "stop"
    runs = re.findall(r"[ \t\r\n]+", answer.text)
    assert runs
    assert max(map(len, runs)) <= 33


@pytest.mark.parametrize(
    "pattern", ["[a-c]{3}-[0-9]{1,4}", "(yes|no)( and (yes|no)){0,3}", r"\{x{0,9}\}", "日本[語酒]?"]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_regular_expression_matches_the_whole_answer(llm: LLM, pattern: str, seed: int) -> None:
    answer = ask(llm, Constraint.regex(pattern), seed)
    assert answer.finish_reason == "stop"
    assert re.fullmatch(pattern, answer.text)


def test_one_of_some_texts(llm: LLM) -> None:
    texts = ["red", "redder", "a.c", "tab\tnew\nline", "日本", "😀 (x)*", "\\", '"', "^$"]
    answers = llm.chat("Choose.", held(Constraint.choice(texts), n=32)).answers
    assert {answer.text for answer in answers} <= set(texts)
    assert len({answer.text for answer in answers}) > 2
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert ask(llm, Constraint.choice(["only this"])).text == "only this"


def test_a_grammar(llm: LLM) -> None:
    lark = 'start: sum\nsum: term ("+" term){0,4}\nterm: /[0-9]{1,3}/ | "(" term ")"'
    for seed in range(4):
        answer = ask(llm, Constraint.grammar(lark), seed, max_tokens=200)
        if answer.finish_reason == "stop":
            assert re.fullmatch(r"[0-9()+]+", answer.text)
            assert isinstance(eval_sum(answer.text), int)


def eval_sum(text: str) -> int:
    return sum(int(term.strip("()")) for term in text.split("+") if term.count("(") == term.count(")"))


# -- beside everything else


def test_a_stream_equals_the_whole_answer(llm: LLM) -> None:
    for constraint in (Constraint.json(PERSON), Constraint.regex("[a-z ]{30}"), Constraint.choice(["ünï", "日本"])):
        params = held(constraint, 5)
        streamed = "".join(delta.text for delta in llm.stream("Say something.", params))
        assert streamed == ask(llm, constraint, 5).text


def test_neighbours_are_not_touched(llm: LLM) -> None:
    free = [held(None, seed, max_tokens=30, temperature=t) for seed, t in enumerate((0.0, 1.0, 0.7, 1.3))]
    alone = [llm.chat("Say something.", params).answers[0] for params in free]
    fixed = [
        held(constraint, 9) for constraint in (Constraint.json(PERSON), Constraint.json(), Constraint.regex("a{20}"))
    ]
    mixed: list[SamplingParams] = []
    for i, params in enumerate(free):
        mixed += [params, *fixed[i : i + 1]]
    together = [completion.answers[0] for completion in llm.chat([QUESTION] * len(mixed), mixed, use_tqdm=False)]
    assert [together[mixed.index(params)].token_ids for params in free] == [answer.token_ids for answer in alone]
    for params in fixed:
        assert params.constraint is not None
        assert together[mixed.index(params)].text == ask(llm, params.constraint, 9).text, "nor by neighbours"


def test_probabilities_stay_the_models_own(llm: LLM) -> None:
    free = llm.chat("Say something.", held(None, logprobs=5, max_tokens=1)).answers[0]
    answer = ask(llm, Constraint.regex("zz"), logprobs=5)
    assert free.logprobs is not None
    assert answer.logprobs is not None
    assert answer.logprobs[0].top == free.logprobs[0].top
    assert answer.logprobs[0].token_id not in [token_id for token_id, _ in free.logprobs[0].top]


@pytest.mark.parametrize("options", [{"num_blocks": 11}, {"num_blocks": 256}, {"max_num_batched_tokens": 16}])
def test_preempted_and_computed_again(checkpoint: Path, options: dict[str, Any]) -> None:
    """What was generated before a preemption must not be told to the grammar twice."""
    limits = {"max_model_len": 160, **options}
    asks = [
        Ask([words(seed, 20 + seed)], greedy(40, temperature=1.0, seed=seed, ignore_eos=False, constraint=constraint))
        for seed, constraint in enumerate([Constraint.regex("([a-z]{3} ){9}end"), Constraint.json(PERSON), None] * 2)
    ]
    engine = make_engine(checkpoint, **limits)
    outcomes = run(engine, asks)
    assert (engine.stats().preemptions > 0) == (options.get("num_blocks") == 11)
    roomy = make_engine(checkpoint, num_blocks=256, max_model_len=160)
    assert [outcome.token_ids for outcome in outcomes] == [run(roomy, [one])[0].token_ids for one in asks]


# -- when it ends


def test_only_the_end_is_left(llm: LLM) -> None:
    end = llm.engine.config.spec.ids.eos
    for changes in ({}, {"min_tokens": 50}, {"ignore_eos": True}):
        answer = ask(llm, Constraint.choice(["ab"]), **changes)
        assert (answer.text, answer.finish_reason, answer.token_ids[-1] in end) == ("ab", "stop", True)


def test_the_end_is_put_off_while_more_may_follow(llm: LLM) -> None:
    short = Constraint.regex("[a-z]*")
    assert len(ask(llm, short, min_tokens=30).token_ids) >= 30
    assert ask(llm, short, ignore_eos=True, max_tokens=50).finish_reason == "length"
    assert len(ask(llm, short, ignore_eos=True, max_tokens=50).token_ids) == 50


def test_a_stop_string_and_max_tokens_cut(llm: LLM) -> None:
    constraint = Constraint.regex("abcdefgh")
    cut = ask(llm, constraint, stop=("def",))
    assert (cut.text, cut.finish_reason, cut.stop_reason) == ("abc", "stop", "def")
    short = ask(llm, constraint, max_tokens=2)
    assert short.finish_reason == "length"
    assert "abcdefgh".startswith(short.text)


# -- which tokens may come


@pytest.fixture(scope="module")
def grammars(checkpoint: Path) -> Grammars:
    return Grammars(load_spec(checkpoint))


def allowed(answer: AnswerGrammar, grammars: Grammars) -> set[int]:
    spec = grammars._spec
    num_words = -(-spec.text.vocab_size // 32)
    line = np.zeros(num_words, dtype=np.int32)
    answer.wait(120)
    assert answer.fill(line, token_words(spec.ids.eos, num_words)) is None
    return set(np.flatnonzero(np.unpackbits(line.view(np.uint8), bitorder="little")).tolist())


def test_special_tokens_and_padding_are_no_text(grammars: Grammars, llm: LLM) -> None:
    spec, tokenizer = load_spec(llm.engine.config.spec.folder), llm.tokenizer
    anything = allowed(grammars.start(Constraint.regex("(?s:.)*")), grammars)
    assert anything & tokenizer.special_ids == set(spec.ids.eos), (
        "the ends, as this regular expression matches nothing too"
    )
    assert max(anything) < tokenizer.vocab_size < spec.text.vocab_size
    assert len(anything) > 256
    spelt = allowed(grammars.start(Constraint.regex(re.escape("<|im_end|>") + "x")), grammars)
    assert not spelt & tokenizer.special_ids, "spelt out, it is text"


def test_the_end_is_there_when_the_grammar_accepts(grammars: Grammars, llm: LLM) -> None:
    answer, ends = grammars.start(Constraint.regex("a(bc)?")), set(llm.engine.config.spec.ids.eos)
    seen = []
    for letter in "abc":
        seen.append(bool(allowed(answer, grammars) & ends))
        answer.accept(llm.tokenizer.encode(letter)[0])
    assert (seen, allowed(answer, grammars)) == ([False, True, False], ends)


def test_a_grammar_cannot_ask_for_pictures_or_an_early_end(llm: LLM) -> None:
    for lark in ("start: <|image_pad|>", 'start: "a" <|im_end|> "b"'):
        with pytest.raises(InvalidRequest, match="cannot be kept to"):
            ask(llm, Constraint.grammar(lark))
    boxes = Constraint.grammar('start: <|box_start|> "(1,2)" <|box_end|>')
    assert ask(llm, boxes, skip_special_tokens=False).text == "<|box_start|>(1,2)<|box_end|>"


@pytest.mark.parametrize("shape", [(1, 1, 20), (3, 19, 608), (2, 19, 593)])
def test_bits_on_a_device_are_those_on_the_host(shape: tuple[int, int, int]) -> None:
    rows, num_words, count = shape
    lines = np.random.default_rng(0).integers(-(2**31), 2**31, (rows, num_words), dtype=np.int32)
    host = np.unpackbits(lines.view(np.uint8), axis=1, count=count, bitorder="little").astype(bool)
    assert np.array_equal(unpack_bits(torch.from_numpy(lines), count).numpy(), host)


# -- what cannot be kept to


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        (Constraint.json({"type": "strin"}), "strin"),
        (Constraint.json({"not": {"type": "string"}}), "not"),
        (Constraint.json({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Constraint.json({"$ref": "#"}), "nothing matches"),
        (Constraint.json({"$ref": "https://example.com/schema.json"}), "does not fetch"),
        (Constraint.json({"$ref": "file:///etc/hostname"}), "does not fetch"),
        (Constraint.json('{"type": '), "EOF"),
        (Constraint.json("[1]"), "cannot be kept to"),
        (Constraint("json_schema", '{"items":' * 2000 + "{}" + "}" * 2000), "recursion"),
        (Constraint.regex("(a"), "unclosed group"),
        (Constraint.regex("(?=a)b"), "look-around"),
        (Constraint.regex("(" * 30_000 + "a" + ")" * 30_000), "nested"),
        (Constraint.grammar("start: missing"), "missing"),
        (Constraint.grammar("start: " + "(" * 30_000 + '"a"' + ")" * 30_000), "nested"),
        (Constraint.grammar(""), "cannot be kept to"),
        (Constraint.regex("\ud800"), "cannot be kept to"),
    ],
)
def test_what_cannot_be_compiled_is_told(llm: LLM, constraint: Constraint, says: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)) as caught:
        ask(llm, constraint)
    assert caught.value.param == "constraint"
    assert len(caught.value.message) < 500


def test_deep_references_do_not_overflow_the_stack(llm: LLM) -> None:
    definitions: dict[str, Any] = {
        f"a{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}, "required": ["x"]}
        for i in range(600)
    }
    definitions["a600"] = {"type": "string"}
    answer = ask(llm, Constraint.json({"$defs": definitions, "$ref": "#/$defs/a0"}), max_tokens=10)
    assert answer.finish_reason == "length"


class Slow(AnswerGrammar):
    def fill(self, words: Any, end_words: Any) -> str | None:
        time.sleep(0.5)
        return super().fill(words, end_words)


def test_a_grammar_that_takes_too_long_fails_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "MOST_SECONDS", 0.05)
    start = llm.engine.grammars.start

    def slow_start(constraint: Constraint) -> AnswerGrammar:
        answer = start(constraint)
        return Slow(answer._compiled) if constraint.text == "slow" else answer

    monkeypatch.setattr(llm.engine.grammars, "start", slow_start)
    with pytest.raises(RequestFailed, match="too complex"):
        ask(llm, Constraint.regex("slow"))
    with pytest.warns(RuntimeWarning, match="too complex"):
        both = llm.chat([QUESTION] * 2, [held(Constraint.regex("slow")), held(None, max_tokens=3)], use_tqdm=False)
    assert [completion.answers[0].finish_reason for completion in both] == ["error", "length"]
    monkeypatch.undo()
    assert ask(llm, Constraint.regex("fast")).text == "fast"


def test_others_go_on_while_a_grammar_is_compiled(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: Future[Matcher] = Future()
    start = llm.engine.grammars.start
    ready = start(Constraint.regex("late"))
    monkeypatch.setattr(llm.engine.grammars, "start", lambda constraint: AnswerGrammar(waiting))
    late = llm.stream("a", held(Constraint.regex("late")))
    early = llm.stream("b", held(None, max_tokens=5))
    first = next(early)
    assert first.finish_reason is None
    pieces: list[str] = []
    thread = threading.Thread(target=lambda: pieces.extend(delta.text for delta in late))
    thread.start()
    list(early)
    assert not pieces
    ready.wait(120)
    waiting.set_result(ready._compiled.result())
    thread.join(120)
    assert "".join(pieces) == "late"


def test_what_was_compiled_is_kept_within_bounds(checkpoint: Path) -> None:
    grammars = Grammars(load_spec(checkpoint))
    for number in range(80):
        grammars.check(Constraint.choice([f"text {number}"]))
    assert 0 < len(grammars._kept) <= 64
    assert grammars._num_chars == sum(len(text) for _, text in grammars._kept)
    assert grammars.start(Constraint.choice(["text 79"])).is_ready


def test_equal_grammars_are_compiled_once(checkpoint: Path) -> None:
    """n answers of one request arrive at once."""
    grammars = Grammars(load_spec(checkpoint))
    answers = [grammars.start(Constraint.json(PERSON)) for _ in range(64)]
    assert len({id(answer._compiled) for answer in answers}) == 1
    fields = (Constraint.regex("(", param="guided_regex"), Constraint.regex("(", param="structured_outputs.regex"))
    for constraint in fields:
        with pytest.raises(InvalidRequest) as caught:
            grammars.check(constraint)
        assert caught.value.param == constraint.param
