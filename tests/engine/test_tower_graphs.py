"""Pictures over static memory: what the tower makes of each alone, whatever lies beside it; what is recorded, when."""

from __future__ import annotations

import dataclasses
import gc
import logging
import random
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qvl.bench.shape import write_shape
from qvl.engine import tower_graphs
from qvl.engine.config import EngineOptions, resolve
from qvl.engine.device import own_stream
from qvl.engine.graphs import CudaRecorder
from qvl.engine.memory import vision_bytes
from qvl.engine.tower_graphs import AMONG, MOST_PATCHES, OFTEN, Shape, TowerSteps, layout_of
from qvl.kernels.fused import rotate
from qvl.kernels.segments import Segments, segment_kernel
from qvl.layers import linear as layers
from qvl.layers import norm as norms
from qvl.layers import rotary
from qvl.models import vision
from qvl.models.vision import VisionTower
from qvl.specs import VisionSpec
from qvl.types import Grid
from tests.engine.test_graphs import Tracer, torch_only  # noqa: F401  # a fixture
from tests.engine.test_memory import H200

ROWS = 64
SPEC = VisionSpec(
    depth=1, embed_dim=96, num_heads=2, mlp_ratio=2, in_channels=3, patch_size=4, temporal_patch_size=2, merge_size=2,
    hidden_size=64,
)  # fmt: skip


class Tiles:
    """As `qvl.kernels.on_gpu.attention_segments`: what tiles are."""

    FIELDS = 4

    @staticmethod
    def rows_for(lengths: Sequence[int]) -> int:
        return ROWS

    @staticmethod
    def tiles_of(lengths: Sequence[int], rows: int) -> np.ndarray:
        starts = np.cumsum([0, *lengths])
        found = [
            (start + at, min(rows, length - at), start, length)
            for start, length in zip(starts.tolist(), lengths, strict=False)
            for at in range(0, length, rows)
        ]
        return np.array(sorted(found, key=lambda tile: -tile[3]), dtype=np.int32)


def attend_tiles(qkv: Tensor, angles: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
    """`segment_attention` by tiles, in tensor operations that do not ask what is in them; no tile leaves a nan."""
    turned = rotate(qkv[:, :2].flatten(1, 2), *angles).unflatten(1, (2, -1))
    q, k, v = turned[:, 0], turned[:, 1], qkv[:, 2]
    assert segments.tiles is not None
    first, rows, key, keys = (field[:, None] for field in segments.tiles.long().unbind(1))
    at, every = torch.arange(ROWS), torch.arange(len(qkv))
    mine = (every >= key) & (every < key + keys)  # [tiles, n]
    place = first + at  # [tiles, ROWS]
    scores = torch.einsum("trhd,khd->thrk", q[place.clamp(max=len(q) - 1)], k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mine[:, None, None], -torch.inf).softmax(-1)
    found = torch.einsum("thrk,khd->trhd", weights, torch.where(torch.isnan(v), 0.0, v)).flatten(2).flatten(0, 1)
    out = torch.full((len(q) + 1, found.shape[1]), torch.nan)
    out.index_copy_(0, torch.where(at < rows, place, len(q)).flatten(), found)
    return out[:-1]


@pytest.fixture
def tower(torch_only: None, monkeypatch: pytest.MonkeyPatch) -> VisionTower:  # noqa: F811
    plain = vision.segment_attention

    def either(qkv: Tensor, angles: tuple[Tensor, Tensor], segments: Segments) -> Tensor:
        return (plain if segments.tiles is None else attend_tiles)(qkv, angles, segments)

    monkeypatch.setattr(vision, "segment_attention", either)
    monkeypatch.setattr(vision, "quick_gelu_linear", lambda x, weight, bias: gelu(F.linear(x, weight, bias)))
    return drawn(SPEC, torch.float32, "cpu")


def gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def drawn(spec: VisionSpec, dtype: torch.dtype, device: str) -> VisionTower:
    """A tower of random weights."""
    tower = VisionTower(spec, dtype, dtype).to_empty(device=device)
    generator = torch.Generator().manual_seed(0)
    for weight in tower.parameters():
        drawn = torch.randn(weight.shape, generator=generator) * (0.1 if weight.dim() == 1 else weight.shape[1] ** -0.5)
        weight.data.copy_(drawn)
    return tower


def patches_of(grids: Sequence[Grid], spec: VisionSpec, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(grid.num_patches for grid in grids), spec.patch_dim, generator=generator)


def random_grids(rng: random.Random) -> list[Grid]:
    return [
        Grid(rng.choice((1, 1, 1, 2)), 2 * rng.randint(1, 6), 2 * rng.randint(1, 6)) for _ in range(rng.randint(1, 4))
    ]


@torch.inference_mode()
def test_padding_and_neighbours_change_no_picture(tower: VisionTower) -> None:
    """Of any sizes, eagerly and in a replay of what was recorded with others: as the tower by itself."""
    tracer, rng = Tracer(), random.Random(0)
    steps = TowerSteps(tower, Tiles(), torch.device("cpu"), tracer)
    for turn in range(30):
        grids = random_grids(rng)
        patches = patches_of(grids, SPEC, turn)
        steps._patches.fill_(torch.nan)  # as what was there before may be
        parts = list(torch.split(patches, [grid.num_patches for grid in grids]))
        found = steps.run(parts, grids)
        assert not parts
        assert found is not None
        torch.testing.assert_close(found, tower(patches, grids), rtol=1e-4, atol=1e-4)
        steps.record_wanted()
    assert tracer.replayed > 10
    assert 2 <= tracer.recorded == len(steps.replays)


@torch.inference_mode()
def test_what_comes_often_is_recorded_and_who_came_last_stays(
    tower: VisionTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tower_graphs, "MOST_GRAPHS", 2)
    tracer = Tracer()
    steps = TowerSteps(tower, Tiles(), torch.device("cpu"), tracer)
    small, wide, third = ([Grid(1, 2, side)] for side in (2, 80, 150))

    def times(count: int, grids: list[Grid]) -> None:
        for _ in range(count):
            assert steps.run([patches_of(grids, SPEC)], grids) is not None
            steps.record_wanted()

    times(OFTEN - 1, small)
    assert (tracer.recorded, tracer.replayed) == (0, 0)
    times(1, small)  # recorded behind it, so that it need not wait
    assert (tracer.recorded, tracer.replayed) == (1, 0)
    times(2, small)
    assert (tracer.recorded, tracer.replayed) == (1, 2)
    times(OFTEN, wide)
    times(1, small)
    times(OFTEN, third)
    assert list(steps.replays) == [Shape(128, 2, ROWS), Shape(384, 6, ROWS)]
    assert tracer.recorded == 3
    times(AMONG, small)  # the others are forgotten
    times(OFTEN - 1, wide)
    assert (tracer.recorded, list(steps.replays)) == (3, [Shape(384, 6, ROWS), Shape(128, 2, ROWS)])


@torch.inference_mode()
def test_its_memory_is_free_once_nobody_has_it(tower: VisionTower) -> None:
    """By counting references: a cycle would hold a network's weights until Python searches for garbage."""
    steps = TowerSteps(tower, Tiles(), torch.device("cpu"), Tracer())
    grids = [Grid(1, 4, 4)]
    for _ in range(OFTEN):
        steps.run([patches_of(grids, SPEC)], grids)
        steps.record_wanted()
    assert steps.replays
    gone = weakref.ref(steps)
    gc.disable()
    try:
        del steps
        assert gone() is None
    finally:
        gc.enable()


def test_what_does_not_fit_is_left_alone(tower: VisionTower) -> None:
    steps = TowerSteps(tower, Tiles(), torch.device("cpu"), None)
    too_many = [Grid(1, 2, MOST_PATCHES // 2 + 2)]
    parts = [torch.zeros(0)]
    assert steps.run(parts, too_many) is None
    assert len(parts) == 1
    crumbs = [Grid(1, 2, 2)] * 40  # a tile each
    assert layout_of(tuple(crumbs), 2, Tiles, False) is None
    assert layout_of(tuple(crumbs[:18]), 2, Tiles, False) is not None
    full = layout_of((Grid(1, 74, 74),), 2, Tiles, False)
    assert full is not None
    assert full.shape == Shape(MOST_PATCHES, MOST_PATCHES // ROWS, ROWS)


@torch.inference_mode()
def test_a_recording_that_fails_is_told_once_and_pictures_go_on(
    tower: VisionTower, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = Tracer(most=1)
    steps = TowerSteps(tower, Tiles(), torch.device("cpu"), tracer)
    with caplog.at_level(logging.WARNING, "qvl.engine"):
        for columns in (2, 80, 150):
            for _ in range(OFTEN + 1):
                grids = [Grid(1, 2, columns)]
                patches = patches_of(grids, SPEC)
                found = steps.run([patches.clone()], grids)
                torch.testing.assert_close(found, tower(patches, grids), rtol=1e-4, atol=1e-4)
                steps.record_wanted()
    [line] = [record.getMessage() for record in caplog.records]
    assert "RuntimeError: out of memory for one more graph" in line
    assert len(steps.replays) == 1
    assert tracer.replayed == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@torch.inference_mode()
def test_recorded_towers_are_those_run_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many sizes, after others were recorded, replayed and given up, and after steps that use the same memory."""
    device = torch.device("cuda", torch.cuda.current_device())
    spec = dataclasses.replace(SPEC, depth=2, embed_dim=160, patch_size=14)
    kernel = segment_kernel(device, torch.bfloat16, spec.head_dim)
    if kernel is None:
        pytest.skip("attention inside pictures is torch's on this GPU")
    monkeypatch.setattr(tower_graphs, "MOST_GRAPHS", 3)
    tower = drawn(spec, torch.bfloat16, "cuda")
    rng = random.Random(0)
    usual = [random_grids(rng) for _ in range(6)] + [[Grid(1, 32, 32)] * 3]
    with torch.cuda.stream(own_stream(device)):
        recorder = CudaRecorder(32 << 20, device)
        other = recorder.record(lambda: torch.full((1 << 22,), torch.nan, device=device))
        plain = TowerSteps(tower, kernel, device, None)
        steps = TowerSteps(tower, kernel, device, recorder)
        recorded: set[Shape] = set()
        for turn in range(150):
            grids = usual[rng.randrange(len(usual))] if turn % 5 else random_grids(rng)
            patches = patches_of(grids, spec, turn).to(device, torch.bfloat16)
            exact = tower(patches, grids).float()
            want, found = (each.run([patches], grids) for each in (plain, steps))
            assert want is not None
            assert found is not None
            assert (found.float() - want.float()).norm() <= 1e-3 * want.float().norm()
            assert (found.float() - exact).norm() <= 1e-2 * exact.norm()
            steps.record_wanted()
            recorded |= steps.replays.keys()
            if turn % 3 == 0:
                other()
        torch.cuda.current_stream().synchronize()
    assert len(recorded) > len(steps.replays) == 3


class Held(TorchDispatchMode):
    """The most bytes that tensors hold at a time inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.most = max(self.most, sum(self.live.values()))
        return result


@torch.inference_mode()
def test_a_recording_holds_what_is_reckoned_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The largest one of the true shape, on no device: with kernels that work in place, as on a GPU."""
    monkeypatch.setattr(
        vision, "segment_attention", lambda qkv, angles, segments: qkv.flatten(1)[:, : qkv[0, 0].numel()]
    )
    monkeypatch.setattr(vision, "quick_gelu_linear", F.linear)
    monkeypatch.setattr(layers, "linear", F.linear)
    monkeypatch.setattr(norms, "add_layer_norm", lambda x, delta, weight, bias, eps, out: x.new_empty(x.shape))
    monkeypatch.setattr(rotary, "frequencies_on", lambda device, dim: torch.empty(dim // 2, device=device))
    config = resolve(EngineOptions(model=str(write_shape("7b", tmp_path))), H200)
    tower = VisionTower(config.spec.vision, torch.bfloat16, torch.bfloat16)
    segments = Segments([], torch.empty(0), None, 0)
    with Held() as held:
        patches = torch.empty(MOST_PATCHES, tower.spec.patch_dim, dtype=torch.bfloat16, device="meta")
        positions = torch.empty(MOST_PATCHES, 2, device="meta")
        before = held.most
        tower.compute([patches], positions, segments)
    reckoned = vision_bytes(config, MOST_PATCHES, in_place=True)
    assert 0.99 * reckoned < held.most - before <= reckoned
