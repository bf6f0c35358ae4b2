"""Steps over static memory, each size recorded once as a CUDA graph and replayed; first of all those of decodes alone.

    numbers int64 [5, capacity]      |  b decodes  | padding to the bucket |  (not computed)  |
      ids, positions, slots, rows, lengths            0, 0, -1, nobody's, 0

One copy from the host fills `numbers`; everything else a decode needs lies on the device (`SequenceRows`). A padded row
stores no keys and values and attends to nothing. Knows buckets and recordings. Does not know requests; steps with
prompts are those of `qvl.engine.prompt_graphs`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qvl.engine.config import EngineConfig
from qvl.engine.inputs import DecodeNumbers, known_ids
from qvl.engine.rows import SequenceRows
from qvl.engine.sampler import Sampler
from qvl.kernels.gpu import compiling_together, told
from qvl.layers.attention import AttentionMetadata, KVCache
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration

logger = logging.getLogger("qvl.engine")

COST = "steps run eagerly, which costs milliseconds a token while few requests run"


Replay = Callable[[], Tensor]


class Recorder(Protocol):
    """Turns work over static memory into something that does the same again with little effort."""

    def record(self, work: Replay, *, ran: bool = False) -> Replay:
        """What a replay leaves is valid until the next one, of whatever was recorded. `ran`: `work` has run before."""


class CudaRecorder:
    """CUDA graphs that share their memory: one is replayed at a time, and what it leaves is used before the next.

    The current stream must not be the device's default one, on which nothing can be recorded. `room`: bytes that they
    find there in one piece; without it torch makes pieces as it goes, which the next ones do not fill.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._make_room: Replay = lambda: torch.zeros(room, dtype=torch.uint8, device=device)
        self._room: Replay | None = None  # whose memory the others use

    def record(self, work: Replay, *, ran: bool = False) -> Replay:
        if self._room is None:
            self._room = self._record(self._make_room, ran=False)
        return self._record(work, ran)

    def _record(self, work: Replay, ran: bool) -> Replay:
        """`work` runs once before it is recorded: compiling and loading kernels, as first use does, no graph may do."""
        graph = torch.cuda.CUDAGraph()
        if not ran:
            work()
            torch.cuda.current_stream().synchronize()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = work()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the recording is invalid already: the first error counts
                graph.capture_end()
            raise
        graph.capture_end()
        lent = not_kept(result)

        def replay() -> Tensor:
            graph.replay()
            return lent

        return replay


class _Place:
    """An address, in the words that libraries of the GPU tell each other one."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.element_size()}",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def not_kept(tensor: Tensor) -> Tensor:
    """The same memory on a GPU, which torch may give to others when `tensor` is gone."""
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype)


class StaticSteps(Protocol):
    """Steps over static memory: what they are, and of which of them there are recordings."""

    replays: dict[Any, Replay]

    def works(self) -> Mapping[Any, Replay]:
        """All that can be recorded, the largest first: the others fit into its memory."""

    def compile(self) -> None:
        """Launch every kernel of any of them once."""


def record_all(recorder: Recorder, kinds: Items[StaticSteps], device: torch.device) -> None:
    """All sizes of all kinds, or none, said once."""
    started = time.monotonic()
    try:
        if device.type == "cuda":
            with compiling_together():  # nothing is computed
                for steps in kinds:
                    steps.compile()
        for steps in kinds:
            steps.replays = {key: recorder.record(work) for key, work in steps.works().items()}
    except Exception as error:  # noqa: BLE001  # a driver, a compiler, an operation that no graph takes
        for steps in kinds:
            steps.replays = {}
        logger.warning("no CUDA graphs: %s; %s", told(error), COST)
        return
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what was tried lies in other pieces than steps will want
    count = sum(len(steps.replays) for steps in kinds)
    logger.info("recorded %d CUDA graphs in %.1f s", count, time.monotonic() - started)


def describe(steps: StaticSteps) -> str:
    return f"{len(steps.replays)} CUDA graphs" if steps.replays else "without CUDA graphs"


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a step of b decodes left on the device; valid until the next step."""

    logits: Tensor  # [b, vocab]
    best: Tensor  # int64 [b], the most likely token, FAILED where logits are not numbers
    rows: Tensor  # int64 [b]


def bucket_sizes(most: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `most`: from 8 on at most 7 rows are computed in vain."""
    return sorted({*(size for size in (1, 2, 4) if size < most), *range(8, most, 8), most})


class DecodeSteps:
    """Runs steps of up to `max_num_seqs` decodes. What has no recording runs eagerly, in the same sizes."""

    def __init__(
        self,
        config: EngineConfig,
        model: Qwen2VLForConditionalGeneration,
        kv_cache: KVCache,
        tables: SequenceRows,
        sampler: Sampler,
    ) -> None:
        self.config, self.model, self.kv_cache, self.tables, self.sampler = config, model, kv_cache, tables, sampler
        capacity = config.max_num_seqs
        self.sizes = bucket_sizes(capacity)
        self._padding = np.zeros((5, capacity), dtype=np.int64)
        self._padding[2], self._padding[3] = -1, tables.padding
        self._numbers = torch.from_numpy(self._padding.copy()).to(tables.device)
        self._best = torch.zeros(capacity, dtype=torch.int64, device=tables.device)
        self.replays: dict[int, Replay] = {}

    def works(self) -> dict[int, Replay]:
        """As `StaticSteps`."""
        return {size: lambda size=size: self._compute(size) for size in reversed(self.sizes)}  # type: ignore[misc]

    def compile(self) -> None:
        """As `StaticSteps`; variants go by powers of two."""
        for size in self.sizes:
            if size & (size - 1) == 0 or size == self.sizes[-1]:
                self._compute(size)

    def run(self, numbers: DecodeNumbers) -> Decoded:
        """One step; the caches, the last tokens and what is returned are ready in the order of the stream."""
        count = len(numbers.rows)
        size = next(size for size in self.sizes if size >= count)
        self._fill(numbers, count)
        replay = self.replays.get(size)
        logits = self._compute(size) if replay is None else replay()
        return Decoded(logits[:count], self._best[:count], self._numbers[3, :count])

    def _fill(self, numbers: DecodeNumbers, count: int) -> None:
        # Page-locked memory of its own for every step: the copy of the step before may still be under way.
        host = torch.empty(self._numbers.shape, dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        lines = host.numpy()
        lines[:] = self._padding
        fields = (numbers.token_ids, numbers.positions, numbers.slots, numbers.rows, numbers.seq_lens)
        for line, values in zip(lines, fields, strict=True):
            line[:count] = values
        self._numbers.copy_(host, non_blocking=True)

    def _compute(self, size: int) -> Tensor:
        """The work of a step of `size` decodes, all of it on the device: logits [size, vocab]."""
        ids, positions, slots, rows, seq_lens = self._numbers[:, :size]
        metadata = AttentionMetadata(
            seq_lens=seq_lens.to(torch.int32),
            block_table=self.tables.block_tables.index_select(0, rows),
            slot_mapping=slots,
            query_lens=[1] * size,
            # An upper bound: only the device knows the lengths of a replay.
            context_lens=[self.config.max_model_len] * size,
            block_size=self.config.block_size,
            num_decodes=size,
        )
        hidden_states = self.model.embed(known_ids(ids, rows, self.tables))
        hidden_states = self.model(hidden_states, positions.expand(3, size), self.kv_cache, metadata)
        logits = self.model.logits(hidden_states)
        best = self.sampler.best(logits)
        self.tables.remember(rows, best)
        self._best[:size].copy_(best)
        return logits
