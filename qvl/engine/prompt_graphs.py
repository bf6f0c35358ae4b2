"""Steps of few tokens with prompts among them over static memory: padded to a few sizes, recorded as CUDA graphs.

    numbers int64 [11, most]      |  n tokens, decodes first  | padding to the size |  (not computed)  |
      ids, 3 positions, slots         of each token               0, 0, -1
      rows, lengths                   of each sequence            nobody's, 0 (of prompts too: they have tiles)
      last tokens, their rows         of each that samples        (not read)
      tiles, in two lines             of the prompts              of no tokens

The network is what is recorded: a hundred tokens take the host longer to launch than a GPU to compute, and a slow host
is behind with a thousand. What goes into it and what comes out is done anew in every step, for pictures and the number
of answers differ. Knows sizes and recordings. Does not know requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from qvl.engine.config import MIXED_TOKENS, EngineConfig
from qvl.engine.inputs import UNKNOWN, MediaRows, Numbers, StepNumbers, known_ids
from qvl.engine.rows import SequenceRows
from qvl.kernels.linear import joins
from qvl.layers.attention import TILE_FIELDS, AttentionMetadata, KVCache, cut_prompts
from qvl.models.qwen2_vl import DecoderLayer, Qwen2VLForConditionalGeneration

MOST_NARROW = 512
SIZE_STEP = 64  # rows that a product takes at a time: fewer would hardly be faster
MOST_TOKENS = MIXED_TOKENS["cuda"]
MOST_JOINED = 1024  # where gate and up are one kernel and take no memory: so many fit into that of the others
WIDE_STEP = 128  # above MOST_NARROW
LONGEST = 1023  # tokens of context: longer ones have a kernel of their own, which pays among so many rows
MOST_ALONE = 256  # up to here the kernels of decodes cost what can be noticed where there are none
MOST_PROMPTS = 32
IDS, SLOTS, ROWS, LENGTHS, LAST, SAMPLING, TILES, LINES = 0, 4, 5, 6, 7, 8, 9, 11
POSITIONS = slice(1, 4)


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What one recording takes."""

    tokens: int
    decodes: bool


def most_tokens(config: EngineConfig, joined: bool) -> int:
    """Of a step that is recorded; `joined`: see `joins_gate_and_up`."""
    return min(MOST_JOINED if joined else MOST_TOKENS, config.max_num_batched_tokens)


def num_wide(config: EngineConfig, joined: bool) -> int:
    """Shapes of more than MOST_NARROW tokens."""
    return sum(shape.tokens > MOST_NARROW for shape in shapes_for(most_tokens(config, joined)))


def joins_gate_and_up(model: Qwen2VLForConditionalGeneration) -> bool:
    """Whether one kernel computes both and their product, for the largest step."""
    weight = cast("DecoderLayer", model.model.layers[0]).mlp.gate_up_proj.weight
    return weight is not None and joins(weight, MOST_JOINED)


def shapes_for(most: int) -> list[Shape]:
    """The smallest first."""
    few = min(most, MOST_NARROW)
    sizes = [*range(SIZE_STEP, few, SIZE_STEP), *range(few, most, WIDE_STEP), most]
    return [Shape(size, decodes) for size in sizes for decodes in (False, True) if decodes or size <= MOST_ALONE]


class PromptSteps:
    """Runs steps that `shape_for` has a shape for. What has no recording runs eagerly, in the same shapes."""

    def __init__(
        self, config: EngineConfig, model: Qwen2VLForConditionalGeneration, kv_cache: KVCache, tables: SequenceRows
    ) -> None:
        self.config, self.model, self.kv_cache, self.tables = config, model, kv_cache, tables
        self.most = most_tokens(config, joins_gate_and_up(model))
        self.shapes = shapes_for(self.most)
        self.replays: dict[Shape, Callable[[], Tensor]] = {}
        self._padding = np.zeros((LINES, self.most), dtype=np.int64)
        self._padding[SLOTS], self._padding[ROWS] = -1, tables.padding
        self._numbers = torch.from_numpy(self._padding.copy()).to(tables.device)
        self._tiles = self._numbers[TILES:].view(torch.int32).view(-1, TILE_FIELDS)  # [most, TILE_FIELDS]
        size = model.spec.text.hidden_size
        self._hidden_states = torch.zeros((self.most, size), dtype=model.compute_dtype, device=tables.device)

    def works(self) -> dict[Shape, Callable[[], Tensor]]:
        """As `qvl.engine.graphs.StaticSteps`."""
        return {shape: lambda shape=shape: self._compute(shape) for shape in reversed(self.shapes)}  # type: ignore[misc]

    def compile(self) -> None:
        """As `StaticSteps`."""
        for shape in self.shapes[:2]:
            self._compute(shape)

    def shape_for(self, numbers: StepNumbers) -> Shape | None:
        """The least that `numbers` fit into."""
        count, num_prompts = len(numbers.token_ids), len(numbers.query_lens) - numbers.num_decodes
        if count > self.most or num_prompts > MOST_PROMPTS:
            return None
        if count > MOST_NARROW and max(numbers.context_lens[numbers.num_decodes :], default=0) > LONGEST:
            return None
        return next(
            shape for shape in self.shapes if shape.tokens >= count and (shape.decodes or not numbers.num_decodes)
        )

    def run(
        self, shape: Shape, numbers: StepNumbers, embed: Callable[[Tensor, Sequence[MediaRows]], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """After the final norm those that sample [m, hidden], and their rows [m], valid until the next step.

        `embed`: token ids [n] and where pictures lie among them, to [n, hidden].
        """
        count, num_sampling = len(numbers.token_ids), len(numbers.last_tokens)
        self._fill(numbers)
        ids = self._numbers[IDS, :count]
        if UNKNOWN in numbers.token_ids[: numbers.num_decodes]:
            decoded = ids[: numbers.num_decodes]
            decoded.copy_(known_ids(decoded, self._numbers[ROWS, : numbers.num_decodes], self.tables))
        self._hidden_states[:count].copy_(embed(ids, numbers.media))
        replay = self.replays.get(shape)
        hidden_states = self._compute(shape) if replay is None else replay()
        return hidden_states[:num_sampling], self._numbers[SAMPLING, :num_sampling]

    def _fill(self, numbers: StepNumbers) -> None:
        # Page-locked memory of its own for every step: the copy of the step before may still be under way.
        host = torch.empty(self._numbers.shape, dtype=torch.int64, pin_memory=self._numbers.is_cuda)
        lines: Numbers = host.numpy()
        lines[:] = self._padding
        lines[POSITIONS, : len(numbers.token_ids)] = numbers.positions
        for line, values in (
            (IDS, numbers.token_ids),
            (SLOTS, numbers.slots),
            (ROWS, numbers.rows),
            (LENGTHS, numbers.context_lens[: numbers.num_decodes]),
            (LAST, numbers.last_tokens),
            (SAMPLING, numbers.sampling_rows),
        ):
            lines[line, : len(values)] = values
        tiles = cut_prompts(
            numbers.query_lens, numbers.context_lens, numbers.num_decodes, self.model.attention.tile_tokens
        )
        lines[TILES:].view(np.int32).reshape(-1, TILE_FIELDS)[: len(tiles)] = tiles
        self._numbers.copy_(host, non_blocking=True)

    def num_tiles(self, shape: Shape) -> int:
        """As many as the tokens of MOST_PROMPTS prompts can have: each fills all of its tiles but one."""
        return min(shape.tokens, shape.tokens // self.model.attention.tile_tokens + MOST_PROMPTS)

    def _compute(self, shape: Shape) -> Tensor:
        """The network over a step of this shape, all of it on the device: after the final norm those that sample
        [num_seqs, hidden], whatever lies behind them.
        """
        size, num_seqs = shape.tokens, min(shape.tokens, self.config.max_num_seqs)
        metadata = AttentionMetadata(
            seq_lens=self._numbers[LENGTHS, :num_seqs].to(torch.int32),
            block_table=self.tables.block_tables.index_select(0, self._numbers[ROWS, :num_seqs]),
            slot_mapping=self._numbers[SLOTS, :size],
            query_lens=[1] * num_seqs,
            context_lens=[self.config.max_model_len] * num_seqs,  # only the device knows what a replay computes
            block_size=self.config.block_size,
            num_decodes=num_seqs if shape.decodes else 0,
            prompt_tiles=self._tiles[: self.num_tiles(shape)],
        )
        last, positions = self._numbers[LAST, :num_seqs], self._numbers[POSITIONS, :size]
        hidden_states = self._hidden_states[:size]
        early = size >= 2 * num_seqs  # only they go through the end of the last layer: gathering costs something, too
        out: Tensor = self.model(hidden_states, positions, self.kv_cache, metadata, last if early else None)
        return out if early else out.index_select(0, last)
