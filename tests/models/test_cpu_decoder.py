"""All layers of a step of decodes in one call on a CPU: the same numbers as layer by layer, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qvl.kernels.linear import form_of_numbers
from qvl.kernels.native import NativeUnavailable
from qvl.kernels.on_cpu import all_layers
from qvl.kernels.on_cpu.all_layers import MOST
from qvl.kernels.on_cpu.linear_codes import kernels
from qvl.kernels.on_cpu.linear_floats import FEW, choose_cpu_linear, native_product, whole
from qvl.kernels.sdpa import GatherAttention
from qvl.models.cpu_decoder import CpuDecoder, cpu_decoder
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.specs import load_spec
from tests.kernels.compiled import skip_without_compiler
from tests.models import oracle
from tests.models.pages import Pages

FORMS = ("none", "int8", "int4")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(folder: Path, dtype: torch.dtype, quantization: str) -> Any:
    """The network; skips where nothing is compiled, or torch multiplies few rows faster."""
    model = build_model(load_spec(folder), dtype, "cpu", quantization)
    if model.cpu_decoder is None:
        if all_layers.decode_library() is None or (quantization != "none" and kernels().library is None):
            skip_without_compiler()
        try:
            native_product(dtype)
        except NativeUnavailable as error:
            skip_without_compiler(error)
        pytest.skip("torch multiplies few rows faster here")
    load_weights(model, folder)
    return model


class Counted:
    """Whether the call was made."""

    def __init__(self, own: CpuDecoder) -> None:
        self.own = own
        self.made: list[bool] = []

    def decode(self, *arguments: Any) -> Tensor | None:
        out = self.own.decode(*arguments)
        self.made.append(out is not None)
        return out


def steps(model: Any, decoder: object, rows: int, count: int) -> tuple[list[Tensor], Pages]:
    """`count` steps of `rows` decodes behind prompts of different lengths, and the cache that they leave."""
    model.cpu_decoder = decoder
    generator = torch.Generator().manual_seed(rows)
    pages = Pages(model, rows)
    for i in range(rows):
        prompt = torch.randint(0, 500, (3 + 5 * i,), generator=generator)
        pages.step([(i, model.embed(prompt), torch.arange(len(prompt)).expand(3, -1))])
    out = []
    for _ in range(count):
        hidden = model.embed(torch.randint(0, 500, (rows,), generator=generator))
        positions = [torch.full((3, 1), pages.lengths[i]) + torch.tensor([[0], [i], [2 * i]]) for i in range(rows)]
        out.append(pages.compute([(i, hidden[i : i + 1], positions[i]) for i in range(rows)]))
    return out, pages


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, FEW, 40])
@torch.inference_mode()
def test_one_call_gives_what_layer_by_layer_gives(
    checkpoints: tuple[Path, ...], dtype: torch.dtype, quantization: str, rows: int
) -> None:
    model = load(checkpoints[0], dtype, quantization)
    counted = Counted(model.cpu_decoder)
    expected, known = steps(model, None, rows, 3)
    got, pages = steps(model, counted, rows, 3)
    assert counted.made[-3:] == [rows <= model.cpu_decoder.own.call.products.most] * 3
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    for one, other in zip(known.cache, pages.cache, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", ["text", "pictures"])
@torch.inference_mode()
def test_it_is_as_near_the_reference_as_the_rest(checkpoints: tuple[Path, ...], name: str) -> None:
    """Token by token through the call, pictures' positions too."""
    reference, ours = oracle.load_reference(checkpoints[0]), load(checkpoints[0], torch.float32, "none")
    counted = ours.cpu_decoder = Counted(ours.cpu_decoder)
    case = oracle.make_case(reference.config, name)
    positions = oracle.reference_positions(reference, case)
    out = oracle.our_logits(ours, case, positions, reference.config, 1)
    assert counted.made == [True] * len(case.input_ids)
    assert oracle.relative_error(out, oracle.reference_logits(reference, case)) < 1e-4


@torch.inference_mode()
def test_other_steps_go_layer_by_layer(checkpoints: tuple[Path, ...]) -> None:
    model = load(checkpoints[0], torch.float32, "none")
    counted = Counted(model.cpu_decoder)
    most = counted.own.call.products.most
    assert most == (FEW if choose_cpu_linear(torch.float32).several is whole else MOST)
    _, pages = steps(model, counted, most + 1, 1)
    made = list(counted.made)
    assert not made[-1]  # more rows than it takes
    hidden, positions = model.embed(torch.arange(3)), torch.full((3, 3), 60)
    pages.step([(0, hidden[:1], positions[:, :1]), (1, hidden[1:], positions[:, 1:])])
    assert not counted.made[-1]  # a decode beside a prompt
    pages.step([(0, hidden[:1], positions[:, :1])])
    assert counted.made[-1]
    model.attention = GatherAttention()
    pages.step([(0, hidden[:1], positions[:, :1])])
    assert not counted.made[-1]  # what another attention has planned


@torch.inference_mode()
def test_rows_that_are_asked_for_come_out(checkpoints: tuple[Path, ...]) -> None:
    model = load(checkpoints[0], torch.float32, "none")
    hidden = model.embed(torch.arange(4))
    chunks = [(i, hidden[i : i + 1].clone(), torch.zeros(3, 1, dtype=torch.int64)) for i in range(4)]
    every = Pages(model, 4).compute(chunks)
    some = Pages(model, 4).compute(chunks, torch.tensor([3, 1]))
    assert torch.equal(some, every[[3, 1]])


@torch.inference_mode()
def test_weights_that_change_where_they_lie_are_seen(checkpoints: tuple[Path, ...]) -> None:
    model = load(checkpoints[0], torch.float32, "none")
    chunk = (0, model.embed(torch.tensor([5])), torch.zeros(3, 1, dtype=torch.int64))
    pages = Pages(model, 1)
    before = pages.compute([(chunk[0], chunk[1].clone(), chunk[2])])
    model.model.layers[0].mlp.down_proj.weight.zero_()
    pages.lengths = [0]
    assert not torch.equal(pages.compute([(chunk[0], chunk[1].clone(), chunk[2])]), before)


def test_without_a_part_there_is_none(checkpoints: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, bf16 = load_spec(checkpoints[0]).text, torch.bfloat16
    attention = load(checkpoints[0], bf16, "none").attention
    form = form_of_numbers(bf16, torch.device("cpu"))
    assert cpu_decoder(spec, bf16, form, attention) is not None
    assert cpu_decoder(spec, bf16, form, GatherAttention()) is None
    assert cpu_decoder(spec, bf16, "fp8", attention) is None
    monkeypatch.setattr(all_layers, "compiled_products", lambda *_: None)
    assert cpu_decoder(spec, bf16, form, attention) is None
    monkeypatch.undo()
    monkeypatch.setattr(all_layers, "decode_library", lambda: None)
    assert cpu_decoder(spec, bf16, form, attention) is None
