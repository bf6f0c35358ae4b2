"""Intake on a tiny checkpoint: prompts, limits, and errors that say what to do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qvl.engine.config import DeviceFacts, EngineConfig, EngineOptions, resolve
from qvl.engine.intake import Intake, answer_sampling, fitting_max_pixels
from qvl.errors import BadMedia, InvalidRequest, MediaRefused, PromptTooLong, TooManyMedia
from qvl.prompt import block_keys
from qvl.tokenizer import Tokenizer
from qvl.types import (
    ChatRequest,
    CompletionRequest,
    MediaPart,
    Message,
    Part,
    PixelLimits,
    SamplingParams,
    TextPart,
)

FACTS = DeviceFacts("cpu", (0, 0), 8 << 30, "float32", 1)


def make(checkpoint: Path, **options: object) -> Intake:
    config = resolve(EngineOptions.from_dict({"model": str(checkpoint), "max_model_len": 512, **options}), FACTS)
    return Intake(config, Tokenizer.from_folder(config.spec.folder, config.spec.ids))


@pytest.fixture(scope="module")
def intake(checkpoint: Path) -> Intake:
    return make(checkpoint)


def picture(width: int = 84, height: int = 56, value: int = 7) -> MediaPart:
    return MediaPart("image", np.full((height, width, 3), value, np.uint8))


def user(*parts: Part | str) -> tuple[Message, ...]:
    return (Message("user", tuple(TextPart(part) if isinstance(part, str) else part for part in parts)),)


def test_pictures_lie_where_the_template_put_them(intake: Intake) -> None:
    prepared = intake.prepare_chat(ChatRequest(user("a", picture(84, 56), "b", picture(56, 56), "c")))
    ids, spans = prepared.prompt.token_ids, prepared.prompt.spans
    special = intake.spec.ids
    assert [span.length for span in spans] == [6, 4] == [one.num_tokens for one in prepared.media]
    for span in spans:
        assert ids[span.offset - 1] == special.vision_start
        assert ids[span.offset : span.end] == [special.image_pad] * span.length
        assert ids[span.end] == special.vision_end
    assert ids.count(special.image_pad) == 10
    text = intake.tokenizer.decode([i for i in ids if i not in special.never_sampled])
    assert text.index("a") < text.index("b") < text.rindex("c")


def test_typed_placeholders_are_text(intake: Intake) -> None:
    typed = "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    for prepared in (
        intake.prepare_chat(ChatRequest(user(typed))),
        intake.prepare_completion(CompletionRequest(typed)),
    ):
        assert not intake.spec.ids.never_sampled & set(prepared.prompt.token_ids)
        assert typed in intake.tokenizer.decode(prepared.prompt.token_ids)
        assert prepared.prompt.spans == ()


def test_the_message_to_the_engine_agrees_with_the_prompt(intake: Intake) -> None:
    request = ChatRequest(user(picture()), SamplingParams(max_tokens=3, seed=2**63 - 1, n=3), cache_salt="tenant")
    prepared = intake.prepare_chat(request)
    messages = [prepared.request(f"r{i}", i) for i in range(3)]
    assert [m.sampling.seed for m in messages] == [2**63 - 1, -(2**63), -(2**63) + 1]
    (media,) = messages[1].media
    (span,) = prepared.prompt.spans
    assert (media.offset, media.length, media.grid, media.digest) == (span.offset, span.length, span.grid, span.digest)
    assert (media.height, media.width, media.pixels) == (56, 84, None)
    assert messages[0].salt == b"tenant"


def test_answers_without_a_seed_stay_without() -> None:
    sampling = SamplingParams(n=2)
    assert answer_sampling(sampling, 1) is sampling
    assert answer_sampling(SamplingParams(seed=5), 2).seed == 7


def test_sampling_is_resolved_and_max_tokens_is_the_room(intake: Intake) -> None:
    prepared = intake.prepare_chat(ChatRequest(user("hello")))
    room = 512 - len(prepared.prompt.token_ids)
    filled = prepared.sampling
    assert filled.max_tokens == room
    values = dataclasses.asdict(filled)
    assert {name for name, value in values.items() if value is None} <= {"seed", "logprobs", "constraint"}
    clipped = intake.prepare_chat(ChatRequest(user("hello"), SamplingParams(max_tokens=10**9)))
    assert clipped.sampling.max_tokens == room
    own = intake.prepare_chat(ChatRequest(user("hello"), SamplingParams(max_tokens=2)))
    assert own.sampling.max_tokens == 2


def test_a_prompt_may_leave_room_for_one_token_and_no_less(intake: Intake) -> None:
    fits = intake.prepare_completion(CompletionRequest((5,) * 511))
    assert fits.sampling.max_tokens == 1
    with pytest.raises(PromptTooLong) as caught:
        intake.prepare_completion(CompletionRequest((5,) * 512))
    assert (caught.value.num_tokens, caught.value.limit, caught.value.param) == (512, 512, "prompt")
    with pytest.raises(InvalidRequest) as refused:
        intake.prepare_completion(CompletionRequest((5,) * 500, SamplingParams(min_tokens=13)))
    assert refused.value.param == "min_tokens"


def test_too_long_tells_the_tokens_of_each_picture_and_a_size_that_fits(checkpoint: Path) -> None:
    intake = make(checkpoint, max_model_len=100)
    parts = (picture(196, 168), picture(168, 196), picture(56, 56))
    with pytest.raises(PromptTooLong) as caught:
        intake.prepare_chat(ChatRequest(user(*parts, "read")))
    message = caught.value.message
    text = caught.value.num_tokens - 42 - 42 - 4
    assert f"picture 1 42, picture 2 42, picture 3 4, text {text}" in message
    assert "With max_pixels" in message
    proposed = int(message.split("max_pixels ")[1].split()[0])
    fits = intake.prepare_chat(ChatRequest(user(*parts, "read"), limits=PixelLimits(max_pixels=proposed)))
    assert len(fits.prompt.token_ids) < 100
    with pytest.raises(PromptTooLong):
        intake.prepare_chat(ChatRequest(user(*parts, "read"), limits=PixelLimits(max_pixels=proposed + 28 * 28)))


def test_the_size_that_is_told_fits_whatever_the_room(checkpoint: Path) -> None:
    intake = make(checkpoint)
    told = 0
    for room in range(40, 120):
        small = Intake(dataclasses.replace(intake.config, max_model_len=room), intake.tokenizer)
        parts = (picture(280, 280), "read")
        try:
            small.prepare_chat(ChatRequest(user(*parts)))
        except PromptTooLong as error:
            size = int(error.message.split("max_pixels ")[1].split()[0])
            small.prepare_chat(ChatRequest(user(*parts), limits=PixelLimits(max_pixels=size)))
            told += 1
    assert told > 40


@pytest.mark.parametrize(
    "messages",
    [
        user("word " * 200_000),
        user("x" * 200_000),
        user(*["some words " * 20] * 100),
        tuple(Message("user", (TextPart("hello"),)) for _ in range(3000)),
    ],
    ids=["words", "one word", "parts", "messages"],
)
def test_what_is_far_too_long_is_not_counted(intake: Intake, messages: tuple[Message, ...]) -> None:
    with pytest.raises(PromptTooLong, match="has more than 512 tokens"):
        intake.prepare_chat(ChatRequest(messages))


def test_what_is_too_long_is_counted_exactly(intake: Intake) -> None:
    ids = intake.tokenizer.encode("word " * 700)
    with pytest.raises(PromptTooLong, match=f"has {len(ids)} tokens"):
        intake.prepare_completion(CompletionRequest("word " * 700))


def test_no_size_fits_when_the_text_alone_is_too_long(checkpoint: Path) -> None:
    intake = make(checkpoint, max_model_len=64)
    with pytest.raises(PromptTooLong, match="do not fit at any size"):
        intake.prepare_chat(ChatRequest(user(picture(), "long text " * 50)))


@pytest.mark.parametrize("seed", range(5))
def test_fitting_max_pixels_is_the_largest(intake: Intake, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = [(int(w), int(h)) for w, h in rng.integers(30, 900, (3, 2))]
    roomy = EngineConfig.from_json(intake.config.to_json())
    wide = Intake(dataclasses.replace(roomy, max_model_len=10**6), intake.tokenizer)
    parts = [picture(w, h) for w, h in sizes]
    media = wide.prepare_chat(ChatRequest(user(*parts))).media
    room = sum(one.num_tokens for one in media) * 2 // 3
    best = fitting_max_pixels(media, room, intake.spec.processor)
    assert best is not None

    def count(max_pixels: int) -> int:
        limits = PixelLimits(max_pixels=max_pixels)
        return sum(one.num_tokens for one in wide.prepare_chat(ChatRequest(user(*parts), limits=limits)).media)

    assert count(best) <= room < count(best + 784)


def test_too_many_pictures_names_the_flag_and_fetches_nothing(intake: Intake) -> None:
    nowhere = MediaPart("image", "/nowhere/at/all.png")
    with pytest.raises(TooManyMedia, match=r"5 images, the limit is 4; .*--limit-mm-per-prompt image=5"):
        intake.prepare_chat(ChatRequest(user(*[nowhere] * 5)))


def test_a_limit_of_zero_refuses_the_kind(checkpoint: Path) -> None:
    with pytest.raises(TooManyMedia):
        make(checkpoint, limit_mm_per_prompt="video=0").prepare_chat(
            ChatRequest(user(MediaPart("video", np.zeros((4, 56, 56, 3), np.uint8))))
        )


def test_an_error_says_which_picture(intake: Intake) -> None:
    good, video = picture(), MediaPart("video", np.zeros((4, 56, 56, 3), np.uint8))
    with pytest.raises(BadMedia, match=r"^picture 2: "):
        intake.prepare_chat(ChatRequest(user(good, video, MediaPart("image", b"no picture"))))
    with pytest.raises(MediaRefused, match=r"^picture 1: ") as refused:
        intake.prepare_chat(ChatRequest(user(MediaPart("image", "/etc/hostname"))))
    assert "hostname" not in refused.value.message
    assert str(refused.value) == refused.value.message
    with pytest.raises(BadMedia, match=r"^video 1: "):
        intake.prepare_chat(ChatRequest(user(good, MediaPart("video", []))))


def test_pixel_limits_of_part_over_request_over_server(checkpoint: Path) -> None:
    intake = make(checkpoint, mm_processor_kwargs={"max_pixels": 16 * 784})
    big = np.zeros((560, 560, 3), np.uint8)

    def tokens(part: PixelLimits, request: PixelLimits) -> int:
        messages = user(MediaPart("image", big, part))
        return intake.prepare_chat(ChatRequest(messages, limits=request)).media[0].num_tokens

    silent = PixelLimits()
    assert tokens(silent, silent) == 16
    assert tokens(silent, PixelLimits(max_pixels=9 * 784)) == 9
    assert tokens(PixelLimits(max_pixels=4 * 784), PixelLimits(max_pixels=9 * 784)) == 4


@pytest.mark.parametrize(
    ("sampling", "param"),
    [
        (SamplingParams(logit_bias={608: 1.0}), "logit_bias"),
        (SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=(3, 608)), "stop_token_ids"),
    ],
)
def test_ids_outside_the_vocabulary_name_their_field(intake: Intake, sampling: SamplingParams, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        intake.prepare_chat(ChatRequest(user("x"), sampling))
    assert caught.value.param == param
    assert "607" in caught.value.message


def test_a_plain_prompt_of_ids_is_taken_as_it_is(intake: Intake) -> None:
    assert intake.prepare_completion(CompletionRequest((3, 1, 2))).prompt.token_ids == [3, 1, 2]
    for bad in ((), (608,), (-1,)):
        with pytest.raises(InvalidRequest) as caught:
            intake.prepare_completion(CompletionRequest(bad))
        assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="empty"):
        intake.prepare_completion(CompletionRequest(""))


def test_a_message_can_be_continued(intake: Intake) -> None:
    messages = (*user("say it"), Message("assistant", (TextPart("The answer is"),)))
    prepared = intake.prepare_chat(ChatRequest(messages, continue_final_message=True))
    assert intake.tokenizer.decode(prepared.prompt.token_ids).endswith("The answer is")


def test_equal_pictures_from_different_sources_share_their_keys(intake: Intake) -> None:
    array = np.random.default_rng(0).integers(0, 256, (56, 84, 3)).astype(np.uint8)
    sources = (array, Image.fromarray(array), array.copy())
    prompts = [intake.prepare_chat(ChatRequest(user(MediaPart("image", source), "x"))).prompt for source in sources]
    keys = [block_keys(prompt.token_ids, prompt.spans, 16) for prompt in prompts]
    assert keys[0] == keys[1] == keys[2]
    other = intake.prepare_chat(ChatRequest(user(MediaPart("image", 255 - array), "x"))).prompt
    assert other.token_ids == prompts[0].token_ids
    assert block_keys(other.token_ids, other.spans, 16)[-1] != keys[0][-1]


def test_a_gpu_engine_gets_the_pixels_as_they_came(intake: Intake) -> None:
    on_gpu = Intake(dataclasses.replace(intake.config, device="cuda"), intake.tokenizer)
    request = ChatRequest(user(picture(100, 70)))
    assert intake.prepare_chat(request).media[0].pixels.shape == (1, 56, 112, 3)
    assert on_gpu.prepare_chat(request).media[0].pixels.shape == (1, 70, 100, 3)
