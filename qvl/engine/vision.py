"""The pictures of a step through the vision tower and into the encoder cache.

Knows pixels in host memory, batches bounded in patches, and what to do when memory runs out. Does not know prompts: a
picture is its digest, its pixels and its grid.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from qvl.engine.batch import ScheduledMedia
from qvl.engine.device import is_out_of_memory, release_cached_memory
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.tower_graphs import TowerSteps
from qvl.engine.transfer import on_device
from qvl.kernels.pixels import pixel_kernels
from qvl.models.preprocess import patchify
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.specs import ProcessorSpec

# Pictures are encoded together up to this many patches (three of a megapixel): more brings no speed, only activations.
MAX_BATCH_PATCHES = 16_500


class MediaEncoder:
    """Encodes pictures; `max_patches` bounds one batch, but for a single picture that is larger by itself."""

    def __init__(
        self,
        model: Qwen2VLForConditionalGeneration,
        cache: EncoderCache[Tensor],
        processor: ProcessorSpec,
        max_patches: int = MAX_BATCH_PATCHES,
    ) -> None:
        self.model = model
        self.cache = cache
        self.processor = processor
        self.max_patches = max_patches
        self.towers: TowerSteps | None = None  # where graphs are worth it
        self.clock = DeviceClock(model.device)
        if model.device.type == "cuda":  # compiled now, not with the first picture
            pixel_kernels(processor, model.compute_dtype)

    def encode(self, media: Sequence[ScheduledMedia]) -> dict[bytes, str]:
        """Put every picture's embeddings [tokens, hidden] into the cache; digests that failed, with the reason.

        Pictures of one size stand side by side: attention takes neighbours of equal length in one batch.
        """
        failed: dict[bytes, str] = {}
        for group in batches(sorted(media, key=size_of), self.max_patches):
            with self.clock.running():
                failed |= self._encode_group(group)
        return failed

    def _encode_group(self, group: Sequence[ScheduledMedia]) -> dict[bytes, str]:
        try:
            embeddings = self._forward(group)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            embeddings = None
        if embeddings is not None:
            for item, rows in zip(group, embeddings, strict=True):
                self.cache.put(item.span.digest, rows)
            return {}
        release_cached_memory(self.model.device)
        if len(group) == 1:
            grid = group[0].span.grid
            reason = (
                f"out of memory while encoding a {group[0].span.kind} of {grid.num_patches} patches; lower max_pixels"
            )
            return {group[0].span.digest: reason}
        # One of them may be too large by itself: the others should not fall with it.
        failed: dict[bytes, str] = {}
        for item in group:
            failed |= self._encode_group([item])
        return failed

    def _forward(self, group: Sequence[ScheduledMedia]) -> list[Tensor]:
        """One tensor [tokens, hidden] per picture, each with memory of its own, so that the cache can let go of one."""
        patches = [self._patches(item) for item in group]
        grids = [item.span.grid for item in group]
        together = None if self.towers is None else self.towers.run(patches, grids)
        if together is None:
            together = self.model.encode_media(patches, grids)
            if len(group) == 1:
                return [together]
        return [part.clone() for part in torch.split(together, [item.span.length for item in group])]

    def _patches(self, item: ScheduledMedia) -> Tensor:
        media = item.seq.media[item.index]
        pixels = on_device(item.seq.pixels[item.index], self.model.device)
        return patchify(pixels, media.height, media.width, self.processor, self.model.compute_dtype)


class DeviceClock:
    """Seconds that a device spent on some work. A GPU is never waited for: its events are read once they are over."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._seconds = 0.0
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """The work inside is counted."""
        if self._on_gpu:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._open.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """All work so far that is over."""
        while self._open and self._open[0][1].query():  # type: ignore[no-untyped-call]
            start, end = self._open.pop(0)
            self._seconds += start.elapsed_time(end) / 1000
        return self._seconds


def size_of(item: ScheduledMedia) -> tuple[int, int]:
    grid = item.span.grid
    return grid.h, grid.w


def batches(media: Iterable[ScheduledMedia], max_patches: int) -> Iterator[list[ScheduledMedia]]:
    """Consecutive pictures, as many as fit into `max_patches` patches, at least one."""
    group: list[ScheduledMedia] = []
    total = 0
    for item in media:
        patches = item.span.grid.num_patches
        if group and total + patches > max_patches:
            yield group
            group, total = [], 0
        group.append(item)
        total += patches
    if group:
        yield group
