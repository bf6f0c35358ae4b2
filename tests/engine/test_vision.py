"""The vision step: batches bounded in patches, embeddings as if each picture were alone, and running out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qvl.engine.batch import ScheduledMedia
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.engine.sequence import Sequence
from qvl.engine.vision import MediaEncoder, batches
from qvl.models.preprocess import patchify
from qvl.models.registry import build_model
from qvl.models.weights import load_weights
from qvl.types import Grid
from tests.engine.harness import Pixels, greedy, pixels, read_spec

SIZES = ((2, 3, 1), (1, 1, 1), (4, 2, 1), (2, 2, 3), (5, 5, 1))  # rows and columns in tokens, frames


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    spec = read_spec(checkpoint)
    model = build_model(spec, torch.float32, "cpu")
    load_weights(model, spec.folder)
    return model


def scheduled(checkpoint: Path, arrays: list[Pixels]) -> list[ScheduledMedia]:
    """One request with these pictures, all of them due; picture i has the digest i * 16."""
    media, offset = [], 0
    for i, array in enumerate(arrays):
        frames, height, width, _ = array.shape
        grid = Grid(-(-frames // 2), height // 14, width // 14)
        length = grid.num_tokens(2)
        kind: Any = "image" if frames == 1 else "video"
        digest = bytes([i]) * 16
        media.append(MediaInput(kind, offset, length, grid.t, grid.h, grid.w, digest, height, width))
        offset += length
    request = AddRequest("r", [1] * (offset + 1), media, greedy())
    seq = Sequence.create(request, read_spec(checkpoint), block_size=4, pixels=arrays)
    return [ScheduledMedia(seq, i) for i in range(len(arrays))]


def encoder(model: Any, media: list[ScheduledMedia], max_patches: int) -> MediaEncoder:
    cache: EncoderCache[torch.Tensor] = EncoderCache(1 << 30)
    for item in media:
        cache.reserve(item.span.digest, 1, "holder")
    return MediaEncoder(model, cache, model.spec.processor, max_patches)


@pytest.mark.parametrize("max_patches", [1, 40, 10_000])
def test_embeddings_are_those_of_each_picture_alone(checkpoint: Path, model: Any, max_patches: int) -> None:
    arrays = [pixels(i, rows, columns, frames) for i, (rows, columns, frames) in enumerate(SIZES)]
    media = scheduled(checkpoint, arrays)
    step = encoder(model, media, max_patches)
    assert step.encode(media) == {}
    for item, array in zip(media, arrays, strict=True):
        patches = patchify(torch.from_numpy(array), array.shape[1], array.shape[2], model.spec.processor)
        alone = model.encode_media(patches, [item.span.grid])
        found = step.cache.get(item.span.digest)
        assert found.shape == (item.span.length, 64)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        # A view would keep the embeddings of the whole batch alive after the cache has let go of the others.
        assert found.untyped_storage().nbytes() == found.numel() * 4


def test_memory_that_runs_out_costs_the_large_picture_only(
    checkpoint: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    media = scheduled(checkpoint, [pixels(i, rows, columns) for i, (rows, columns, _) in enumerate(SIZES)])
    encode = model.encode_media
    sizes: list[int] = []

    def limited(parts: list[torch.Tensor], grids: Any) -> torch.Tensor:
        sizes.append(sum(map(len, parts)))
        if sizes[-1] > 50:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return encode(parts, grids)

    monkeypatch.setattr(model, "encode_media", limited)
    step = encoder(model, media, 10_000)
    failed = step.encode(media)
    assert list(failed) == [media[4].span.digest]
    assert "100 patches" in failed[media[4].span.digest]
    assert all(step.cache.is_filled(item.span.digest) for item in media[:4])
    assert not step.cache.is_filled(media[4].span.digest)
    assert sizes == [176, 4, 16, 24, 32, 100]  # all at once, then each alone, by size


def test_any_other_error_is_a_bug(checkpoint: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(model, "encode_media", broken)
    media = scheduled(checkpoint, [pixels(1, 1, 1)])
    with pytest.raises(RuntimeError, match="shapes"):
        encoder(model, media, 100).encode(media)


class _Item:
    """As much of a ScheduledMedia as `batches` looks at."""

    def __init__(self, patches: int) -> None:
        self.span = self
        self.grid = Grid(1, 1, patches)


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 100))
def test_batches_keep_order_and_bound(sizes: list[int], bound: int) -> None:
    items: list[Any] = [_Item(size) for size in sizes]
    groups = list(batches(items, bound))
    assert [item for group in groups for item in group] == items
    totals = [sum(item.grid.num_patches for item in group) for group in groups]
    assert all(total <= bound or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    joined = [a + b[0].grid.num_patches for a, b in zip(totals, groups[1:], strict=False)]
    assert all(total > bound for total in joined)  # no batch ends before it is full
