"""The model in this process: every way to hand over a conversation, many at once, streams, and what goes wrong."""

from __future__ import annotations

import base64
import io
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

import qvl
from qvl.engine.answers import Collector, LiveAnswers
from qvl.engine.llm import LLM
from qvl.engine.protocol import TokenOutput
from qvl.errors import ConfigError, InvalidRequest, PromptTooLong, RequestFailed
from qvl.types import MediaPart, Message, SamplingParams, TextPart, TokenLogprob, Usage
from tests.engine.oracle import Dialogue, assistant, oracle, picture, user

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32", device="cpu", num_threads=1, num_blocks=256)


@pytest.fixture(autouse=True)
def _idle_and_whole(llm: LLM) -> Any:
    yield
    assert not llm.engine.has_work
    llm.engine.check_integrity()


def reference(checkpoint: Path, dialogue: Dialogue, num_tokens: int = 24) -> tuple[list[int], str]:
    ids = oracle(checkpoint).greedy(dialogue, num_tokens)
    return ids, oracle(checkpoint).tokenizer.decode(ids, skip_special_tokens=True)


def test_the_first_script(checkpoint: Path, llm: LLM) -> None:
    dialogue = [user(picture(1, 90, 130), "Describe this picture.")]
    completion = llm.chat(dialogue, GREEDY)
    ids, text = reference(checkpoint, dialogue)
    assert (list(completion.answers[0].token_ids), completion.text) == (ids, text)
    assert completion.answers[0].finish_reason == "length"
    prompt = oracle(checkpoint).inputs(dialogue)["input_ids"].shape[1]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (prompt, 24)


def test_a_picture_in_every_form(llm: LLM, tmp_path: Path) -> None:
    image = picture(1, 90, 130)
    encoded = io.BytesIO()
    image.save(encoded, "png")
    data, path = encoded.getvalue(), tmp_path / "picture.png"
    path.write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    parts: list[Any] = [
        {"type": "image", "image": image},
        {"type": "image", "image": np.asarray(image)},
        {"type": "image", "image": data},
        {"type": "image", "image": path},
        {"type": "image", "image": str(path)},
        {"image": f"file://{path}"},
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "image_url", "image_url": {"url": image}},
        image,
        path,
    ]
    question = {"type": "text", "text": "What?"}
    turns: list[Any] = [[{"role": "user", "content": [part, question]}] for part in parts]
    turns.append([{"role": "user", "content": (image, "What?")}])
    turns.append([Message("user", (MediaPart("image", image), TextPart("What?")))])
    answers = llm.chat(turns, GREEDY, use_tqdm=False)
    assert len({answer.text for answer in answers}) == 1
    assert len({answer.usage.prompt_tokens for answer in answers}) == 1
    assert llm.chat([{"role": "user", "content": image}], GREEDY).text != answers[0].text


def test_text_alone_and_mixed_turns(checkpoint: Path, llm: LLM) -> None:
    plain = [user("Hello there")]
    assert llm.chat("Hello there", GREEDY).text == reference(checkpoint, plain)[1]
    mixed = [Message("user", (TextPart("Hello"),)), assistant("Hi."), {"role": "user", "content": "Again"}]
    dialogue = [user("Hello"), assistant("Hi."), user("Again")]
    assert llm.chat(mixed, GREEDY).text == reference(checkpoint, dialogue)[1]


def test_videos_as_frames_and_arrays(checkpoint: Path, llm: LLM) -> None:
    frames = [picture(i, 84, 112) for i in range(4)]
    dialogue = [user(frames, "What happens?")]
    want = reference(checkpoint, dialogue)[1]
    stack = np.stack([np.asarray(frame) for frame in frames])
    arrays = [{"role": "user", "content": [{"type": "video", "video": stack}, "What happens?"]}]
    assert [completion.text for completion in llm.chat([dialogue, arrays], GREEDY)] == [want, want]


def test_many_keep_their_order_and_their_own_rules(checkpoint: Path, llm: LLM) -> None:
    dialogues = [[user(picture(i, 60, 60), f"Question {i}?")] for i in range(40)]
    rules = [SamplingParams(max_tokens=1 + i % 5, temperature=0.0, ignore_eos=True) for i in range(40)]
    completions = llm.chat(dialogues, rules, use_tqdm=False)
    assert [len(completion.answers[0].token_ids) for completion in completions] == [1 + i % 5 for i in range(40)]
    for i in (0, 17, 39):
        assert completions[i].text == reference(checkpoint, dialogues[i], 1 + i % 5)[1]
    with pytest.raises(InvalidRequest, match="40 conversations"):
        llm.chat(dialogues, rules[:3])


def test_streams_join_to_the_answer_and_interleave(llm: LLM) -> None:
    dialogues = [[user("One 你好")], [user(picture(2, 60, 90), "Two")]]
    whole = [llm.chat(dialogue, GREEDY) for dialogue in dialogues]
    streams = [llm.stream(dialogue, GREEDY) for dialogue in dialogues]
    collectors = [Collector(), Collector()]
    between = None
    for number, pair in enumerate(itertools.zip_longest(*streams)):
        for collector, delta in zip(collectors, pair, strict=True):
            if delta is not None:
                collector.add(delta)
        if number == 2:
            between = llm.chat(dialogues[0], GREEDY)  # in the middle of both
    joined = [collector.completion() for collector in collectors]
    assert [completion.answers for completion in joined] == [completion.answers for completion in whole]
    assert between is not None
    assert between.answers == whole[0].answers
    assert [c.usage.completion_tokens for c in joined] == [24, 24]


def test_a_stream_that_is_dropped_is_aborted(llm: LLM) -> None:
    stream = llm.stream([user("Hello")], SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True))
    next(stream)
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    llm.stream([user("never read")], GREEDY)


def test_threads_share_the_engine(llm: LLM) -> None:
    dialogues = [[user(f"Number {i}", picture(i, 60, 60))] for i in range(6)]
    want = [llm.chat(dialogue, GREEDY).answers for dialogue in dialogues]
    got: dict[int, Any] = {}

    def ask(i: int) -> None:
        got[i] = llm.chat(dialogues[i], GREEDY).answers

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got.get(i) for i in range(6)] == want


def test_stop_strings_end_the_answer_and_free_the_engine(llm: LLM) -> None:
    dialogue = [user("Hello there")]
    text = llm.chat(dialogue, GREEDY).text
    stop = text[8:11]
    cut = text[: text.index(stop)]
    rules = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True, stop=(stop,))
    answer = llm.chat(dialogue, rules).answers[0]
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (cut, "stop", stop)
    assert len(answer.token_ids) <= 24
    assert "".join(delta.text for delta in llm.stream(dialogue, rules)) == cut


def test_n_answers_differ_and_repeat_with_a_seed(llm: LLM) -> None:
    rules = SamplingParams(max_tokens=12, temperature=1.0, seed=4, n=3, ignore_eos=True)
    completion = llm.chat([user("Hello")], rules)
    texts = [answer.text for answer in completion.answers]
    assert len(set(texts)) == 3
    assert [answer.index for answer in completion.answers] == [0, 1, 2]
    assert completion.usage.completion_tokens == 36
    assert [answer.text for answer in llm.chat([user("Hello")], rules).answers] == texts
    alone = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    assert llm.chat([user("Hello")], alone).text == texts[1]


def test_logprobs_of_every_token(llm: LLM) -> None:
    rules = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=2)
    answer = llm.chat([user("你好")], rules).answers[0]
    assert answer.logprobs is not None
    assert tuple(entry.token_id for entry in answer.logprobs) == answer.token_ids
    assert all(len(entry.top) == 2 and math.exp(entry.logprob) <= 1.0 for entry in answer.logprobs)


def test_raw_prompts_in_every_form(checkpoint: Path, llm: LLM) -> None:
    image = picture(1, 90, 130)
    dialogue = [user(image, "What?")]
    want = reference(checkpoint, dialogue)[1]
    text = oracle(checkpoint).tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    ids = llm.tokenizer.encode_control(text)
    prompts: list[dict[str, Any]] = [
        {"prompt": text, "multi_modal_data": {"image": image}},
        {"prompt": text, "multi_modal_data": {"image": [image]}},
        {"prompt_token_ids": ids, "multi_modal_data": {"image": np.asarray(image)}},
    ]
    assert [completion.text for completion in llm.generate(prompts, GREEDY)] == [want] * 3
    assert llm.generate(prompts[0], GREEDY).text == want
    template = oracle(checkpoint).tokenizer.apply_chat_template
    hello = template([user("Hello")], tokenize=False, add_generation_prompt=True)
    same = [llm.generate(hello, GREEDY), *llm.generate([hello, hello], GREEDY)]
    same.append(llm.generate(llm.tokenizer.encode_control(hello), GREEDY))
    assert {completion.text for completion in same} == {llm.chat([user("Hello")], GREEDY).text}
    frames = [picture(i, 84, 112) for i in range(4)]
    both = [user(frames, image, "What?")]
    text = template(both, tokenize=False, add_generation_prompt=True)
    media = {"image": image, "video": frames}
    assert llm.generate({"prompt": text, "multi_modal_data": media}, GREEDY).text == reference(checkpoint, both)[1]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"prompt": "a", "multi_modal_data": {"image": picture(1, 30, 30)}}, "one pad"),
        ({"prompt": "<|image_pad|>"}, "one pad"),
        ({"prompt": "a", "promt_token_ids": [1]}, "did you mean 'prompt_token_ids'"),
        ({"prompt": "a", "multi_modal_data": {"images": 1}}, "did you mean 'image'"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "either"),
        ({}, "either"),
        ("", "empty"),
        ([10**6], "token id"),
    ],
)
def test_raw_prompts_that_are_refused(llm: LLM, prompt: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        llm.generate(prompt, GREEDY)


def test_mistakes_are_named(checkpoint: Path, llm: LLM) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_model_len'"):
        LLM(str(checkpoint), max_modle_len=10)
    with pytest.raises(ConfigError, match="no checkpoint folder"):
        LLM("no-such-model")
    with pytest.raises(InvalidRequest, match=r"messages\[1\].content\[0\].type"):
        llm.chat([user("a"), {"role": "user", "content": [{"type": "pdf"}]}])
    with pytest.raises(PromptTooLong, match="max_pixels"):
        llm.chat([user(*[picture(i, 400, 400) for i in range(70)])])
    with pytest.raises(InvalidRequest, match="picture 2"):
        llm.chat([user(picture(1, 60, 60), b"not a picture")])
    with pytest.raises(TypeError, match="add_generation_promt"):
        llm.chat([user("a")], add_generation_promt=True)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"'max_tokens'; it goes into SamplingParams\(max_tokens=...\)"):
        llm.chat("a", max_tokens=3)  # type: ignore[call-overload]
    with pytest.raises(InvalidRequest, match="one SamplingParams, not a list"):
        llm.chat([user("a")], [GREEDY])
    for rules in ({"max_tokens": 3}, [{"max_tokens": 3}]):
        for dialogue in ("a", [[user("a")]]):
            with pytest.raises(InvalidRequest, match="SamplingParams"):
                llm.chat(dialogue, rules)  # type: ignore[arg-type]
    for no_dialogue in ({"role": "user", "content": "a"}, None, 3):
        with pytest.raises(InvalidRequest, match="'messages' must be"):
            llm.chat(no_dialogue)  # type: ignore[call-overload]
        with pytest.raises(InvalidRequest, match="'messages' must be"):
            llm.stream(no_dialogue)  # type: ignore[arg-type]
    for no_prompt in (None, 3):
        with pytest.raises(InvalidRequest, match="a prompt must be"):
            llm.generate(no_prompt)  # type: ignore[call-overload]


def test_one_bad_conversation_stops_the_rest(llm: LLM) -> None:
    dialogues = [[user("a")]] * 5 + [[user(b"not a picture")]] + [[user("b")]] * 30
    with pytest.raises(InvalidRequest):
        llm.chat(dialogues, GREEDY, use_tqdm=False)


def test_a_failure_inside_is_told(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), dtype="float32", device="cpu", num_threads=1, num_blocks=256)
    word = llm.tokenizer.encode("~")[0]
    llm.engine.runner.model.model.embed_tokens.weight.data[word] = torch.inf
    rules = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logit_bias={word: -100.0})
    with pytest.raises(RequestFailed, match="finite"):
        llm.chat("~", rules)
    with pytest.raises(RequestFailed, match="finite"):
        list(llm.stream("~", SamplingParams(n=2)))
    with pytest.warns(RuntimeWarning, match="request 1: .*finite"):
        good, bad, other = llm.chat([[user("a")], [user("~")], [user("b")]], rules, use_tqdm=False)
    assert (bad.answers[0].finish_reason, bad.text) == ("error", "")
    assert {good.answers[0].finish_reason, other.answers[0].finish_reason} == {"length"}
    assert not llm.engine.has_work


def test_pixel_limits_reach_the_picture(llm: LLM) -> None:
    image = picture(1, 300, 300)
    large = llm.chat([user(image)], GREEDY).usage.prompt_tokens
    small = llm.chat([user(image)], GREEDY, mm_processor_kwargs={"max_pixels": 56 * 56}).usage.prompt_tokens
    sizes = [smart_resize(300, 300, max_pixels=most) for most in (64 * 28 * 28, 56 * 56)]
    assert large - small == (sizes[0][0] * sizes[0][1] - sizes[1][0] * sizes[1][1]) // 28**2


def test_the_package_offers_it_lazily() -> None:
    assert qvl.LLM is LLM


class _Letters:
    """Ids are bytes."""

    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])


def test_answers_are_put_together_from_outputs() -> None:
    sampling = SamplingParams(n=2, max_tokens=9, logprobs=0, stop=("!",))
    answers = LiveAnswers(5, sampling, _Letters())
    collector = Collector()

    def take(index: int, text: bytes, reason: Any = None) -> Any:
        outputs = [TokenOutput("r", [byte], [TokenLogprob(byte, -1.0)], None) for byte in text]
        outputs[-1] = TokenOutput("r", [text[-1]], [TokenLogprob(text[-1], -1.0)], reason, None, 3)
        delta = answers.take(index, outputs)
        if delta is not None:
            collector.add(delta)
        return delta

    assert take(0, "é".encode()[:1]) is None  # half a character
    assert take(0, "é".encode()[1:]).text == "é"
    assert take(1, b"ab!c").finish_reason == "stop"
    assert (answers.must_abort(1), answers.must_abort(0), answers.num_open) == (True, False, 1)
    assert take(1, b"d") is None  # said after its end
    take(0, b"xyz", "length")
    first, second = collector.completion().answers
    assert (first.text, first.finish_reason, first.token_ids) == ("éxyz", "length", tuple("éxyz".encode()))
    assert (second.text, second.stop_reason, second.token_ids) == ("ab", "!", tuple(b"ab!"))
    assert [len(answer.logprobs or ()) for answer in (first, second)] == [5, 3]
    assert collector.completion().usage == Usage(5, 8, 3)
    with pytest.raises(RequestFailed, match="why"):
        LiveAnswers(1, SamplingParams(), _Letters()).take(0, [TokenOutput("r", [], None, "error", error="why")])


def test_many_show_a_bar_on_a_terminal_only(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogues = [[user(f"Number {i}")] for i in range(3)]
    llm.chat(dialogues, GREEDY)
    assert capsys.readouterr() == ("", "")  # neither of the two is a terminal here
    monkeypatch.setenv("FORCE_COLOR", "1")
    llm.chat(dialogues, GREEDY)
    out, err = capsys.readouterr()
    assert out == ""
    assert "3/3" in err
    assert "tok/s" in err
    llm.chat(dialogues, GREEDY, use_tqdm=False)
    llm.chat(dialogues[0], GREEDY)
    assert capsys.readouterr() == ("", "")
