"""What the device keeps of every running sequence, a row each: its blocks, and the token that it sampled last.

A decode adds a block number once in sixteen steps, so tables go over once and then only what is new. A token sampled in
one step is read by the next one where it lies: the host need not know it yet. Knows rows and who has them. Does not
know the network.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.engine.batch import ScheduledSeq
from qvl.engine.sequence import Sequence, Status
from qvl.engine.transfer import upload


@dataclass(slots=True)
class _Row:
    number: int
    num_preemptions: int
    known: int = 0  # blocks that the tables have


class SequenceRows:
    """Rows for `num_rows` sequences of up to `width` blocks; number `num_rows` is nobody's (padding may use it).

    Everything is enqueued on the current stream: a row that changes hands is read by older steps before it is written.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.padding = num_rows
        self.device = device
        self.block_tables = torch.zeros((num_rows + 1, width), dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
        self.host_tables = np.zeros((num_rows + 1, width), dtype=np.int32)
        self.rope_deltas = np.zeros(num_rows + 1, dtype=np.int64)
        self._free = list(range(num_rows - 1, -1, -1))
        self._rows: dict[Sequence, _Row] = {}

    def place(self, entries: Items[ScheduledSeq]) -> npt.NDArray[np.int64]:
        """The row of every entry, int64 [b]; the tables hold all their blocks afterwards."""
        numbers = np.empty(len(entries), dtype=np.int64)
        grown: list[tuple[int, int, int]] = []
        known = self._rows.get
        for i, entry in enumerate(entries):
            seq = entry.seq
            row = known(seq)
            if row is None:
                row = self._new_row(seq)
            elif row.num_preemptions != seq.num_preemptions:  # it came back with other blocks
                row.num_preemptions, row.known = seq.num_preemptions, 0
            numbers[i] = row.number
            count = len(seq.block_table)
            if row.known < count:
                self.host_tables[row.number, row.known : count] = seq.block_table[row.known :]
                grown.append((row.number, row.known, count))
                row.known = count
        if grown:
            self._send(grown)
        return numbers

    def _new_row(self, seq: Sequence) -> _Row:
        if not self._free:
            for other, row in list(self._rows.items()):
                if other.status is not Status.RUNNING:
                    del self._rows[other]
                    self._free.append(row.number)
        row = self._rows[seq] = _Row(self._free.pop(), seq.num_preemptions)
        self.rope_deltas[row.number] = seq.rope_delta
        return row

    def _send(self, grown: list[tuple[int, int, int]]) -> None:
        """Write blocks [start, stop) of each (row, start, stop) to the device."""
        width = self.host_tables.shape[1]
        places = np.concatenate([np.arange(row * width + start, row * width + stop) for row, start, stop in grown])
        where, blocks = upload([places, self.host_tables.reshape(-1)[places]], self.device)
        self.block_tables.view(-1).index_copy_(0, where, blocks)

    def remember(self, rows: Tensor, tokens: Tensor) -> None:
        """`tokens` int64 [m] were sampled last in `rows` int64 [m]; of one that failed (-1) any will do."""
        self.last_tokens.index_copy_(0, rows, tokens.clamp(min=0))
