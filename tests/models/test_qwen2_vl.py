"""The network against transformers, on three random configurations in which every dimension differs."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qvl.kernels import linear
from qvl.models import qwen2_vl, vision
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import load_spec
from tests.models import oracle
from tests.models.pages import Pages
from tests.models.test_one_row import WrittenOut


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["plain", "tied", "deep"])
def folder(request: pytest.FixtureRequest, checkpoints: tuple[Path, ...]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return oracle.load_reference(folder), oracle.load_ours(folder)


@pytest.mark.parametrize("name", oracle.CASES)
def test_fp32_logits_equal_the_reference(models: tuple[Any, Any], name: str) -> None:
    reference, ours = models
    case = oracle.make_case(reference.config, name)
    expected = oracle.reference_logits(reference, case)
    positions = oracle.reference_positions(reference, case)
    assert oracle.relative_error(oracle.our_logits(ours, case, positions, reference.config), expected) < 1e-4


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_the_reference(models: tuple[Any, Any], chunk: int) -> None:
    reference, ours = models
    case = oracle.make_case(reference.config, "video-and-picture")
    expected = oracle.reference_logits(reference, case)
    positions = oracle.reference_positions(reference, case)
    assert oracle.relative_error(oracle.our_logits(ours, case, positions, reference.config, chunk), expected) < 1e-4


def test_media_tokens_equal_the_reference(models: tuple[Any, Any]) -> None:
    reference, ours = models
    case = oracle.make_case(reference.config, "video-and-picture")
    grids = [grid for _, grid in case.grids]
    with torch.inference_mode():
        shapes = torch.tensor([(grid.t, grid.h, grid.w) for grid in grids])
        expected = reference.model.visual(case.pixel_values, grid_thw=shapes)
    assert oracle.relative_error(ours.encode_media(case.pixel_values, grids), expected) < 1e-5


def test_a_picture_is_encoded_the_same_alone_and_in_company(models: tuple[Any, Any]) -> None:
    reference, ours = models
    case = oracle.make_case(reference.config, "pictures")
    grids = [grid for _, grid in case.grids]
    together = ours.encode_media(case.pixel_values, grids)
    patches = case.pixel_values.split([grid.num_patches for grid in grids])
    alone = torch.cat([ours.encode_media(p, [g]) for p, g in zip(patches, grids, strict=True)])
    assert oracle.relative_error(together, alone) < 1e-5


def test_a_large_picture_in_parts_is_the_same(models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads in groups, patches in chunks, and rows of the decoder in chunks."""
    reference, ours = models
    case = oracle.make_case(reference.config, "video-and-picture")
    grids = [grid for _, grid in case.grids]
    whole = ours.encode_media(case.pixel_values, grids)
    positions = oracle.reference_positions(reference, case)
    logits = oracle.our_logits(ours, case, positions, reference.config)
    attention = ours.visual.blocks[0].attn
    monkeypatch.setattr(vision, "ATTENTION_BYTES", 3 * 4 * attention.head_dim * len(case.pixel_values))  # one head
    monkeypatch.setattr(vision, "MLP_ROWS", 8)
    monkeypatch.setattr(qwen2_vl, "MLP_ROWS", 5)
    assert attention.heads_at_once(torch.empty(len(case.pixel_values), 1)) == 1
    seen: list[weakref.ref[torch.Tensor]] = []
    some_heads = vision.VisionAttention.some_heads

    def spy(*arguments: Any) -> torch.Tensor:
        assert all(heads() is None for heads in seen), "the heads before these are still there"
        heads = some_heads(*arguments)
        seen.append(weakref.ref(heads))
        return heads

    monkeypatch.setattr(vision.VisionAttention, "some_heads", spy)
    parts = list(case.pixel_values.split(20))
    assert oracle.relative_error(ours.encode_media(parts, grids), whole) < 1e-5
    assert not parts and len(seen) > 1
    assert oracle.relative_error(oracle.our_logits(ours, case, positions, reference.config), logits) < 1e-5


def test_gate_and_up_joined_by_one_kernel_are_the_same_in_parts_twice_as_large(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, ours = models
    case = oracle.make_case(reference.config, "picture")
    positions = oracle.reference_positions(reference, case)
    logits = oracle.our_logits(ours, case, positions, reference.config)
    rows: list[int] = []

    class Joined:
        def silu_product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            rows.append(len(x))
            gate, up = F.linear(x, weight).chunk(2, dim=-1)
            return F.silu(gate) * up

    monkeypatch.setattr(linear, "MANY", 8)
    monkeypatch.setattr(linear, "MULTIPLE", 1)
    monkeypatch.setattr(linear, "many_rows", lambda *_: Joined())
    monkeypatch.setattr(qwen2_vl, "MLP_ROWS", 5)
    assert oracle.relative_error(oracle.our_logits(ours, case, positions, reference.config), logits) < 1e-5
    assert len(logits) > 10
    assert set(rows) <= {8, 9, 10} and rows.count(10) >= len(ours.model.layers)  # fewer than 8 are left to two steps


def test_mixed_batches_equal_separate_prefills(models: tuple[Any, Any]) -> None:
    """Decodes of very different lengths beside two prefill chunks, one of them with a cached prefix."""
    reference, ours = models
    cases = [oracle.make_case(reference.config, name) for name in oracle.CASES]
    expected = [oracle.reference_logits(reference, case) for case in cases]
    positions = [oracle.reference_positions(reference, case) for case in cases]
    hidden = [oracle.our_embeddings(ours, case, reference.config) for case in cases]
    pages = Pages(ours, len(cases))
    heads = [len(hidden[0]) - 1, len(hidden[1]) - 1, len(hidden[2]) - 1, 10, 0]
    warm = [(i, hidden[i][:n], positions[i][:, :n]) for i, n in enumerate(heads) if n]
    for chunk in warm:
        pages.step([chunk])
    tails = [(i, hidden[i][n:], positions[i][:, n:]) for i, n in enumerate(heads)]
    for out, (i, _, _), n in zip(pages.step(tails), tails, heads, strict=True):
        assert oracle.relative_error(ours.logits(out), expected[i][n:]) < 1e-4


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("one", [False, True], ids=["plain", "one"])
def test_rows_computed_to_the_end_equal_all(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, count: int, one: bool
) -> None:
    """And the keys and values of the others are stored: the next step finds them."""
    reference, ours = models
    written_out = WrittenOut()
    if one:
        monkeypatch.setattr(type(ours), "one_row_kernels", lambda self, x: written_out if len(x) == 1 else None)
    case = oracle.make_case(reference.config, "video-and-picture")
    positions, hidden = oracle.reference_positions(reference, case), oracle.our_embeddings(ours, case, reference.config)
    n, rows = len(hidden) - 1, torch.tensor([len(hidden) - 2, 0, 7][:count], dtype=torch.int64)
    chunk, last = (0, hidden[:n], positions[:, :n]), (0, hidden[n:], positions[:, n:])
    whole, parts = Pages(ours, 1), Pages(ours, 1)
    expected, out = whole.compute([chunk])[rows], parts.compute([chunk], rows)
    assert out.shape == (count, hidden.shape[1])
    assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(sum(whole.cache, ()), sum(parts.cache, ()), strict=True))
    assert written_out.calls == (3 if one and count == 1 else 0)
    assert torch.equal(whole.compute([last]), parts.compute([last], torch.tensor([0])))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", oracle.CASES)
def test_16_bit_is_at_most_twice_as_far_from_fp32_as_the_reference(
    folder: Path, models: tuple[Any, Any], name: str, dtype: torch.dtype
) -> None:
    exact, _ = models
    case = oracle.make_case(exact.config, name)
    truth = oracle.reference_logits(exact, case)
    theirs = oracle.relative_error(oracle.reference_logits(oracle.load_reference(folder, dtype), case), truth)
    positions = oracle.reference_positions(exact, case)
    ours = oracle.our_logits(oracle.load_ours(folder, dtype), case, positions, exact.config, chunk=11)
    assert ours.dtype == torch.float32
    assert oracle.relative_error(ours, truth) <= 2 * theirs


def load_as(folder: Path, quantization: str) -> Any:
    model = build_model(load_spec(folder), torch.bfloat16, "cpu", quantization)
    load_weights(model, folder)
    return model


def rms_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", oracle.CASES)
def test_8_bits_are_not_far_from_16(folder: Path, models: tuple[Any, Any], name: str) -> None:
    """At most four times as far from fp32 as the reference is in bf16: tiny random networks forgive nothing."""
    exact, _ = models
    case = oracle.make_case(exact.config, name)
    truth, positions = oracle.reference_logits(exact, case), oracle.reference_positions(exact, case)
    theirs = rms_error(oracle.reference_logits(oracle.load_reference(folder, torch.bfloat16), case), truth)
    ours = oracle.our_logits(load_as(folder, "int8"), case, positions, exact.config, chunk=11)
    assert rms_error(ours, truth) <= 4 * theirs


def usual_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """16 even steps between the smallest and the largest of 128 numbers, the rest exact."""
    groups = [
        ((group - low) / step).round() * step + low
        for group in weight.split(128, dim=-1)
        for low in [group.amin(-1, keepdim=True)]
        for step in [(group.amax(-1, keepdim=True) - low) / 15]
    ]
    return torch.cat(groups, dim=-1)


@pytest.mark.parametrize("name", oracle.CASES)
def test_pairs_are_as_near_as_any_bf16(
    folder: Path, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Activations are rounded to bf16 before every product, as the reference's are."""
    exact, _ = models
    monkeypatch.setattr(qwen2_vl, "form_of_numbers", lambda *_: "pairs")
    case, model = oracle.make_case(exact.config, name), load_as(folder, "none")
    assert model.visual.patch_embed.proj.weight is None
    truth, positions = oracle.reference_logits(exact, case), oracle.reference_positions(exact, case)
    theirs = oracle.relative_error(oracle.reference_logits(oracle.load_reference(folder, torch.bfloat16), case), truth)
    ours = oracle.our_logits(model, case, positions, exact.config, chunk=11)
    assert oracle.relative_error(ours, truth) <= 2 * theirs


def test_parts_of_pairs_begin_with_a_tile(
    folder: Path, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some heads at a time, where theirs are whole tiles: the same numbers as all at once."""
    exact, _ = models
    monkeypatch.setattr(qwen2_vl, "form_of_numbers", lambda *_: "pairs")
    case, model = oracle.make_case(exact.config, "picture"), load_as(folder, "none")
    attention = model.visual.blocks[0].attn
    grids = [grid for _, grid in case.grids]
    whole = model.encode_media(case.pixel_values, grids)
    monkeypatch.setattr(vision, "ATTENTION_BYTES", 1)
    expected = {(2, 16): 1, (4, 12): 4, (5, 8): 5}[attention.num_heads, attention.head_dim]
    assert attention.heads_at_once(case.pixel_values) == expected
    assert torch.allclose(model.encode_media(case.pixel_values, grids), whole, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", oracle.CASES[:3])
def test_4_bits_lose_what_4_bits_must(folder: Path, models: tuple[Any, Any], name: str) -> None:
    """Against the reference in fp32 with the same matrices rounded in the usual way."""
    exact, _ = models
    case = oracle.make_case(exact.config, name)
    truth, positions = oracle.reference_logits(exact, case), oracle.reference_positions(exact, case)
    rough = copy.deepcopy(exact)
    for path, module in rough.model.language_model.layers.named_modules():
        if path.endswith("_proj"):
            module.weight.data = usual_four_bits(module.weight.data)
    ours = oracle.our_logits(load_as(folder, "int4"), case, positions, exact.config, chunk=11)
    assert rms_error(ours, truth) <= 1.25 * rms_error(oracle.reference_logits(rough, case), truth)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_rounded_rows_do_not_depend_on_their_chunk(folder: Path, models: tuple[Any, Any], quantization: str) -> None:
    """Up to fp32 noise that tips a code over: far less than the rounding itself."""
    exact, _ = models
    case, model = oracle.make_case(exact.config, "picture"), load_as(folder, quantization)
    positions = oracle.reference_positions(exact, case)
    whole, pieces = (oracle.our_logits(model, case, positions, exact.config, chunk) for chunk in (1000, 5))
    truth = oracle.reference_logits(exact, case)
    assert rms_error(pieces, whole) < 0.5 * rms_error(whole, truth)


def test_inputs_are_left_alone(models: tuple[Any, Any]) -> None:
    _, ours = models
    hidden = ours.embed(torch.arange(5))
    before = hidden.clone()
    Pages(ours, 1).step([(0, hidden, torch.arange(5).expand(3, -1))])
    assert torch.equal(hidden, before)
