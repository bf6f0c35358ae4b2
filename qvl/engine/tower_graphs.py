"""Pictures through the vision tower over static memory: padded to a few sizes, each recorded once it has come often.

    numbers int32  | row and column of n patches (fp32), padding | tiles of attention, some of no rows | (not read) |
    patches        | n, picture by picture                       | padding                             | (not read) |

A tower is 300 kernels, which take a host 9 to 15 ms to launch, whatever they compute; four small pictures take a GPU
less. Patches are padded to what products take at a time, so few sizes come again and again, whatever the pictures are.
Attention is told by its tiles who belongs to whom. Recordings share their memory with those of steps: what one leaves
is copied before the next is replayed. Knows patches and grids. Does not know requests.
"""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.graphs import Recorder, Replay
from qvl.kernels.gpu import told
from qvl.kernels.segments import Segments
from qvl.layers.rotary import vision_positions
from qvl.models.vision import VisionTower, segment_lengths
from qvl.types import Grid

logger = logging.getLogger("qvl.engine")

MOST_PATCHES = 5504  # a picture of a megapixel, or five of 448x448
SIZE_STEP = 128  # patches that a product takes at a time: fewer would not be faster
SPARE_TILES = (0, 4, 16)  # beside those that a single picture of the size has
NOBODY = (0, 0, 0, 1)  # a tile of no rows; no kernel has to expect that there are no keys
OFTEN, AMONG = 3, 64  # who comes so often among so many is recorded
MOST_GRAPHS = 24
COST = "pictures are launched kernel by kernel, which may cost milliseconds each"


@dataclass(frozen=True, slots=True)
class Shape:
    """What one recording takes."""

    patches: int
    tiles: int
    tile_rows: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How certain pictures lie in a shape; `numbers` int32 is page-locked where there is a GPU."""

    shape: Shape
    num_patches: int
    num_tokens: int
    numbers: Tensor


class TowerSteps:
    """Runs what `layout_of` has a layout for. What has no recording runs eagerly, in the same shapes.

    `kernel` attends: as `qvl.kernels.on_gpu.attention_segments`. Without a recorder nothing is ever recorded.
    """

    def __init__(self, tower: VisionTower, kernel: Any, device: torch.device, recorder: Recorder | None) -> None:
        self.tower, self.kernel, self.recorder = tower, kernel, recorder
        spec, dtype = tower.spec, tower.compute_dtype
        tiles = len(kernel.tiles_of([MOST_PATCHES], kernel.rows_for([1]))) + SPARE_TILES[-1]
        self._patches = torch.zeros((MOST_PATCHES, spec.patch_dim), dtype=dtype, device=device)
        self._numbers = torch.zeros(2 * MOST_PATCHES + kernel.FIELDS * tiles, dtype=torch.int32, device=device)
        self._filled: Layout | None = None
        self.replays: OrderedDict[Shape, Replay] = OrderedDict()  # who was used last stands last
        self._recent: deque[Shape] = deque(maxlen=AMONG)
        self._wanted: Shape | None = None

    def run(self, parts: list[Tensor], grids: Sequence[Grid]) -> Tensor | None:
        """Patches of these pictures, which are let go: [tokens, hidden_size], valid until the next recording of
        anything is replayed. None, and nothing is done, if they are too many.
        """
        layout = layout_of(tuple(grids), self.tower.spec.merge_size, self.kernel, self._numbers.is_cuda)
        if layout is None:
            return None
        torch.cat(parts, out=self._patches[: layout.num_patches])
        parts.clear()
        if layout is not self._filled:
            self._numbers[: len(layout.numbers)].copy_(layout.numbers, non_blocking=True)
            self._filled = layout
        replay = self._replay_of(layout.shape)
        tokens = self._compute(layout.shape) if replay is None else replay()
        return tokens[: layout.num_tokens]

    def _replay_of(self, shape: Shape) -> Replay | None:
        if self.recorder is None:
            return None
        self._recent.append(shape)
        if shape in self.replays:
            self.replays.move_to_end(shape)
        elif self._recent.count(shape) >= OFTEN:
            self._wanted = shape
        return self.replays.get(shape)

    def record_wanted(self) -> None:
        """What has come often, if anything new has. Takes some ten milliseconds, in which the device should compute."""
        shape, self._wanted = self._wanted, None
        if shape is not None and self.recorder is not None:
            self._record(shape, self.recorder)

    def _record(self, shape: Shape, recorder: Recorder) -> None:
        """It ran before, so nothing is compiled or loaded now; the device goes on with what it has."""
        if len(self.replays) == MOST_GRAPHS:
            self.replays.popitem(last=False)  # freed once it has run, if it is still under way
        try:
            self.replays[shape] = recorder.record(lambda: self._compute(shape), ran=True)
        except Exception as error:  # noqa: BLE001  # a driver, or memory that is taken
            self.recorder = None
            logger.warning("no more CUDA graphs of the vision tower: %s; %s", told(error), COST)

    def _compute(self, shape: Shape) -> Tensor:
        """The tower over a shape, all of it on the device: [patches / merge_size^2, hidden_size]."""
        positions, tiles = self._numbers[: 2 * shape.patches], self._numbers[2 * shape.patches :]
        fields = self.kernel.FIELDS
        segments = Segments([], tiles[: fields * shape.tiles].view(-1, fields), None, 0, shape.tile_rows)
        patches = self._patches[: shape.patches]
        return self.tower.compute([patches], positions.view(torch.float32).view(-1, 2), segments)


@functools.lru_cache(256)
def layout_of(grids: tuple[Grid, ...], merge_size: int, kernel: Any, pinned: bool) -> Layout | None:
    """None if they are too many patches or too many pictures. `pinned`: the numbers go to a GPU."""
    lengths = segment_lengths(grids)
    count = sum(lengths)
    size = -(-count // SIZE_STEP) * SIZE_STEP
    if size > MOST_PATCHES:
        return None
    rows = kernel.rows_for(lengths)
    tiles = kernel.tiles_of(lengths, rows)
    alone = len(kernel.tiles_of([size], rows))
    room = next((alone + spare for spare in SPARE_TILES if len(tiles) <= alone + spare), None)
    if room is None:
        return None
    numbers = arranged(vision_positions(grids, merge_size), size, tiles, room)
    if pinned:
        numbers = numbers.pin_memory()
    return Layout(Shape(size, room, rows), count, sum(grid.num_tokens(merge_size) for grid in grids), numbers)


def arranged(positions: npt.NDArray[np.float32], size: int, tiles: npt.NDArray[np.int32], room: int) -> Tensor:
    """As `TowerSteps` holds them, int32: positions [patches, 2] padded to `size`, tiles to `room`."""
    numbers = np.zeros(2 * size + tiles.shape[1] * room, dtype=np.int32)
    numbers[: positions.size] = positions.view(np.int32).reshape(-1)
    places = numbers[2 * size :].reshape(room, -1)
    places[: len(tiles)], places[len(tiles) :] = tiles, NOBODY
    return torch.from_numpy(numbers)
