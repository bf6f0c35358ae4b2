"""The same engine on a GPU: parity by ratio, equal answers with and without every shortcut, no wait in a step, pixels,
and memory that stays within its share.
"""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qvl.bench.shape import write_shape
from qvl.engine.engine import Engine
from qvl.engine.intake import Intake
from qvl.engine.messages import read_dialogue
from qvl.engine.noise import gumbel, noise_keys
from qvl.media.resize import resize_bicubic
from qvl.models.preprocess import patchify, resize
from qvl.specs import ProcessorSpec
from qvl.tokenizer import Tokenizer
from qvl.types import ChatRequest, SamplingParams
from tests.engine.harness import (
    Ask,
    Outcome,
    fill_normally,
    forget_blocks,
    greedy,
    make_config,
    make_engine,
    pixels,
    run,
    words,
)
from tests.engine.oracle import Dialogue, Oracle, assistant, picture, user
from tests.engine.test_ahead import random_asks
from tests.engine.test_sampler import draw, make_sampler, params, random_logits, row

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
MIXED = [
    Ask([words(1, 30)]),
    Ask([words(2, 5), pixels(1, 2, 3), words(3, 9)]),
    Ask([words(4, 3), pixels(2, 4, 1), words(5, 2), pixels(3, 1, 1), pixels(4, 3, 3), words(6, 4)]),
    Ask([words(7, 8), pixels(5, 2, 2, frames=5), words(8, 6)]),
    Ask([words(9, 1)]),
    Ask([words(10, 50), pixels(1, 2, 3), words(11, 3)]),
    Ask([words(12, 4)], greedy(24, temperature=1.0, top_p=0.9, seed=5)),
    Ask([words(13, 20)], greedy(20, repetition_penalty=1.2, frequency_penalty=0.3)),
]


def dialogues() -> list[Dialogue]:
    """Pictures whose sides need no resizing: resizing has a test of its own. No video where the reference places it
    otherwise than the weights were trained with (transformers from 5.4 on).
    """
    cases = [
        [user("The quick brown fox jumps over the lazy dog.")],
        [user(picture(1, 112, 140), "What is this?")],
        [user(picture(2, 56, 56), picture(3, 196, 84), picture(4, 84, 280), "Compare them.")],
        [user([picture(i, 84, 112) for i in range(6)], "What happens?")],
        [user(picture(1, 112, 140), "Read it."), assistant("A red square."), user("And the second line?")],
    ]
    return cases if transformers.__version__.startswith("4.") else [*cases[:3], *cases[4:]]


def our_logits(engine: Engine, dialogue: Dialogue) -> torch.Tensor:
    """fp32 [vocab] behind the last token of the prompt."""
    seen: list[torch.Tensor] = []
    sampler = engine.runner.sampler
    best = sampler.best

    def spy(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits.float().cpu().clone()[0])
        return best(logits)

    sampler.best = spy  # type: ignore[method-assign]
    intake = Intake(engine.config, Tokenizer.from_folder(engine.config.spec.folder, engine.config.spec.ids))
    prepared = intake.prepare_chat(ChatRequest(read_dialogue(dialogue), SamplingParams(max_tokens=1, temperature=0.0)))
    engine.add(prepared.request("r"), [media.pixels for media in prepared.media])
    while engine.has_work:
        engine.step()
    sampler.best = best  # type: ignore[method-assign]
    return seen[0]


@torch.inference_mode()
def reference_logits(oracle: Oracle, dialogue: Dialogue) -> torch.Tensor:
    device, dtype = oracle.model.device, oracle.model.dtype
    inputs = {name: value.to(device) for name, value in oracle.inputs(dialogue).items()}
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    return oracle.model(**inputs).logits[0, -1].float().cpu()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_as_close_as_the_reference(checkpoints: tuple[Path, ...], dtype: str) -> None:
    """err(ours_16, reference_fp32) <= 2 * err(reference_16, reference_fp32), over all cases of a checkpoint."""
    for folder in checkpoints:
        engine = make_engine(folder, device="cuda", dtype=dtype, max_model_len=2048)
        exact, rounded = Oracle(folder), Oracle(folder)
        exact.model.cuda()
        rounded.model.cuda().to(getattr(torch, dtype))
        ours = reference = 0.0
        for dialogue in dialogues():
            truth = reference_logits(exact, dialogue)
            ours += (our_logits(engine, dialogue) - truth).square().mean().item()
            reference += (reference_logits(rounded, dialogue) - truth).square().mean().item()
        assert ours**0.5 <= 2 * reference**0.5, folder.name


def test_fp32_answers_are_those_of_the_cpu(checkpoint: Path) -> None:
    want = [outcome.token_ids for outcome in run(make_engine(checkpoint), MIXED)]
    for options in (
        {},
        {"max_num_batched_tokens": 64, "enable_prefix_caching": False},
        {"max_model_len": 96, "block_size": 4, "num_blocks": 25, "max_num_batched_tokens": 64},
    ):
        engine = make_engine(checkpoint, device="cuda", **options)
        assert [outcome.token_ids for outcome in run(engine, MIXED, stagger=2)] == want
        if "num_blocks" in options:
            assert engine.stats().preemptions > 0


def test_the_prefix_cache_changes_nothing(checkpoint: Path) -> None:
    dialogue = dialogues()[2]
    answers = []
    for caching in (True, False):
        engine = make_engine(checkpoint, device="cuda", enable_prefix_caching=caching)
        intake = Intake(engine.config, Tokenizer.from_folder(checkpoint, engine.config.spec.ids))
        sampling = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
        for turn in range(2):
            prepared = intake.prepare_chat(ChatRequest(read_dialogue(dialogue), sampling))
            engine.add(prepared.request(str(turn)), [media.pixels for media in prepared.media])
            outcome = Outcome()
            while engine.has_work:
                for output in engine.step():
                    outcome.take(output)
            assert (outcome.num_cached_tokens > 0) == (caching and turn == 1)
            answers.append(outcome.token_ids)
    assert answers[1:] == answers[:1] * 3


def answers(engine: Engine, asks: list[Ask], stagger: int = 2) -> list[list[int]]:
    return [outcome.token_ids for outcome in run(engine, asks, stagger)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_change_nothing(checkpoint: Path, dtype: str) -> None:
    """Recorded steps and the same steps run one by one, at the same sizes: the same text, whoever comes and goes."""
    asks = random_asks(random.Random(1), 40)
    found = []
    for enforce_eager in (False, True):
        engine = make_engine(checkpoint, device="cuda", dtype=dtype, max_num_seqs=24, enforce_eager=enforce_eager)
        decodes, prompts = engine.runner.decodes, engine.runner.prompts
        assert decodes is not None, engine.info.attention
        assert len(decodes.replays) == (0 if enforce_eager else len(decodes.sizes))
        if dtype == "bfloat16":  # Triton multiplies no fp32 on tensor cores: prompts go through torch then
            assert prompts is not None
            assert len(prompts.replays) == (0 if enforce_eager else len(prompts.shapes))
        found.append(answers(engine, asks))
    assert found[0] == found[1]


def test_recorded_pictures_and_wide_steps_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The true shape: kernel by kernel and as graphs, towers beside steps that are graphs over the same memory, and
    steps of 1,000 tokens.
    """
    monkeypatch.setattr("qvl.models.weights.fill_randomly", fill_normally)
    folder = write_shape("2b", tmp_path / "2b")
    sizes = [(2, 3), (8, 8), (5, 5), (8, 8)]
    asks = [Ask([words(i, 9), pixels(i, *sizes[i % 4]), words(i, 5)], greedy(8)) for i in range(24)]
    texts = [Ask([words(i, 190 + i)], greedy(4)) for i in range(12)]
    found = []
    for enforce_eager in (False, True):
        options: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "max_num_seqs": 6}
        options |= {"max_num_batched_tokens": 1000}
        engine = make_engine(folder, device="cuda", max_model_len=512, enforce_eager=enforce_eager, **options)
        towers, prompts = engine.runner.encoder.towers, engine.runner.prompts
        if towers is None or prompts is None:
            pytest.skip("attention inside pictures is torch's on this GPU")
        assert prompts.most == 1000
        found.append(answers(engine, asks) + answers(engine, texts, stagger=0))
        assert bool(towers.replays) != enforce_eager
    assert found[0] == found[1]


def test_planning_ahead_changes_nothing(checkpoint: Path) -> None:
    asks = random_asks(random.Random(2), 40)
    options: dict[str, Any] = {"device": "cuda", "max_num_seqs": 16, "max_num_batched_tokens": 256}
    found = [answers(make_engine(checkpoint, async_scheduling=ahead, **options), asks) for ahead in (True, False)]
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_every_attention_path_gives_the_answers_of_the_cpu(checkpoint: Path, backend: str) -> None:
    want = answers(make_engine(checkpoint), MIXED)
    for options in ({}, {"max_num_batched_tokens": 64, "block_size": 8, "num_blocks": 512}):
        engine = make_engine(checkpoint, device="cuda", attention_backend=backend, **options)
        assert engine.info.attention.startswith("triton" if backend == "triton" else "gather")
        assert answers(engine, MIXED) == want


def test_a_thousand_requests_with_aborts_give_everything_back(checkpoint: Path) -> None:
    """Text, pictures, several of them, every rule; a fifth is aborted somewhere. Who is not, has the answer of a run
    without aborts (but for one in a hundred: sums of other batches are rounded otherwise).
    """
    rng = random.Random(3)
    asks = random_asks(rng, 1000)
    options: dict[str, Any] = {"device": "cuda", "max_num_seqs": 64, "max_num_batched_tokens": 512, "num_blocks": 400}
    options |= {"max_model_len": 512, "encoder_cache_memory": 1 << 16}
    want = answers(make_engine(checkpoint, async_scheduling=False, enforce_eager=True, **options), asks, stagger=0)
    engine = make_engine(checkpoint, **options)
    outcomes = [Outcome() for _ in asks]
    waiting = deque(enumerate(asks))
    doomed = {i: rng.randint(0, 20) for i in range(1000) if rng.random() < 0.2}
    aborted: set[int] = set()
    while waiting or engine.has_work:
        while waiting and len(engine.scheduler.waiting) < 20:
            number, ask = waiting.popleft()
            ask.submit(engine, str(number))
        for output in engine.step():
            outcomes[int(output.request_id)].take(output)
        for number, length in doomed.items():
            if number not in aborted and len(outcomes[number].token_ids) >= length and engine.abort(str(number)):
                aborted.add(number)
    engine.check_integrity()
    assert engine.scheduler.blocks.num_used == 0
    assert len(aborted) > 50
    ended = [i for i in range(1000) if i not in aborted]
    assert all(outcomes[i].finish_reason in ("stop", "length") for i in ended)
    assert sum(outcomes[i].token_ids == want[i] for i in ended) >= 0.99 * len(ended)


def test_no_step_waits_for_the_device(checkpoint: Path) -> None:
    """Prompts, pictures, chunks, decodes and every way to choose: torch raises where the host would wait unasked."""
    engine = make_engine(checkpoint, device="cuda", max_num_seqs=24, max_num_batched_tokens=96)
    asks = random_asks(random.Random(4), 40)
    run(engine, asks, stagger=1)  # kernels are built and libraries loaded
    forget_blocks(engine)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(engine, asks, stagger=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_largest_picture_fits(tmp_path: Path) -> None:
    """16,384 tokens through a tower of the true shape, in the share that was planned for it."""
    folder = write_shape("2b", tmp_path / "2b")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 12 * (1 << 30) / total
    options: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy", "num_blocks": None, "max_num_seqs": 8}
    engine = make_engine(folder, device="cuda", gpu_memory_utilization=share, max_model_len=20_000, **options)
    ask = Ask([words(1, 10), pixels(1, 128, 128), words(2, 10)], greedy(4))
    torch.cuda.reset_peak_memory_stats()
    [outcome] = run(engine, [ask])
    assert (outcome.finish_reason, len(outcome.token_ids)) == ("length", 4), outcome.error
    assert torch.cuda.max_memory_allocated() <= share * total - (total - free)


def test_not_a_number_stays_with_its_request(checkpoint: Path) -> None:
    good = [Ask([words(i, 10 + 7 * i)], greedy(24)) for i in range(4)]
    engine = make_engine(checkpoint, device="cuda")
    want = [outcome.token_ids for outcome in run(engine, good)]
    for cache in engine.runner.kv_cache:
        for half in cache:
            half.fill_(torch.nan)
    torch.cuda.synchronize()  # the engine works on a stream of its own
    forget_blocks(engine)
    assert [outcome.token_ids for outcome in run(engine, good, stagger=1)] == want


@pytest.mark.parametrize("size", [(480, 640, 448, 616), (37, 91, 56, 112), (1500, 800, 308, 168), (28, 2000, 28, 812)])
def test_pixels_resized_on_the_device_are_within_two_grey_levels(size: tuple[int, int, int, int]) -> None:
    height, width, new_height, new_width = size
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    smooth = np.asarray(picture(1, height, width))
    for image in (noise, smooth):
        want = resize_bicubic(image, new_height, new_width).astype(np.int16)
        frames = torch.from_numpy(image.copy())[None].cuda().permute(0, 3, 1, 2)
        got = resize(frames, new_height, new_width)[0].permute(1, 2, 0).cpu().numpy().astype(np.int16)
        assert np.abs(got - want).max() <= 2
        assert np.abs(got - want).mean() < 0.05


def test_patches_are_those_of_the_cpu() -> None:
    frames = torch.from_numpy(pixels(1, 3, 4, frames=3))
    spec = ProcessorSpec()
    torch.testing.assert_close(patchify(frames.cuda(), 84, 112, spec).cpu(), patchify(frames, 84, 112, spec))


def test_the_sampler_draws_the_same_noise_and_tokens() -> None:
    keys = torch.from_numpy(noise_keys([1, 2, 3], [0, 5, 9]))
    ids = torch.arange(5000, dtype=torch.int32)[None]
    torch.testing.assert_close(gumbel(keys.cuda(), ids.cuda()).cpu(), gumbel(keys, ids), rtol=1e-4, atol=1e-5)
    rules: list[dict[str, Any]] = [
        {}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.2, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.3, "logprobs": 3}, {"presence_penalty": 1.0, "logit_bias": {4: 3.0}},
    ]  # fmt: skip
    rows = [row(params(**rule), seed=i, output=(3, 3, i)) for i, rule in enumerate(rules)]
    logits = random_logits(len(rows))
    logits[1, 3] = torch.nan
    found = []
    for device in (torch.device("cpu"), CUDA):
        sampler = make_sampler((7,), device)
        found.append([token.token_id for token in draw(sampler, logits.clone().to(device), rows)])
    assert found[0] == found[1]
    assert found[0][1] == -1


def test_measured_memory_holds_under_load(checkpoint: Path) -> None:
    """Weights, caches and the largest steps together stay within `gpu_memory_utilization`."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + (1 << 30) / total
    options: dict[str, Any] = {"num_blocks": None, "gpu_memory_utilization": share, "encoder_cache_memory": 1 << 26}
    engine = Engine(make_config(checkpoint, device="cuda", dtype="bfloat16", max_num_batched_tokens=4096, **options))
    assert engine.config.num_blocks is not None
    assert engine.info.kv_cache_bytes > 1 << 27
    for i in range(60):
        ask = Ask([words(i, 10), pixels(i, 8, 8), words(i, 3000)], greedy(40, temperature=1.0))
        ask.submit(engine, str(i))
    while engine.has_work:
        engine.step()
    free_after, _ = torch.cuda.mem_get_info()
    assert total - free_after <= share * total + (64 << 20)  # but for libraries that load code on first use
