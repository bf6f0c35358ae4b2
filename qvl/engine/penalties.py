"""Which tokens a request has used so far and how often, and the three penalties that read these counts.

Knows token histories. Does not know where logits come from, nor when a request ends: the tables are a cache, and one
that was given away is rebuilt from the history that its owner hands in again. Only the distinct tokens of a history are
touched: a thousand picture pads are one of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qvl.types import SamplingParams

KEPT_TABLES = 32  # of requests that are not in the step: a preempted one may come back soon


class HasHistory(Protocol):
    """What is needed of a row: whose it is, and its tokens (the first `num_prompt_tokens` are the prompt)."""

    @property
    def owner(self) -> object: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def num_prompt_tokens(self) -> int: ...


def wants_penalties(sampling: SamplingParams) -> bool:
    """Whether any of the three penalties changes the logits."""
    return (
        sampling.repetition_penalty not in (None, 1.0)
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


class TokenCounts:
    """Every distinct token of one history, and how often the output (not the prompt) has it."""

    def __init__(self, owner: object) -> None:
        self.owner = owner
        self._num_counted = 0
        self._size = 0
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.empty(64, dtype=np.float32)
        self._place: dict[int, int] = {}

    def update(self, row: HasHistory) -> None:
        """Take in what the history has gained."""
        if self._num_counted == 0:
            for token_id in dict.fromkeys(row.token_ids[: row.num_prompt_tokens]):
                self._count(token_id, 0)
            self._num_counted = row.num_prompt_tokens
        for token_id in row.token_ids[self._num_counted :]:
            self._count(token_id, 1)
        self._num_counted = len(row.token_ids)

    def _count(self, token_id: int, times: int) -> None:
        place = self._place.setdefault(token_id, self._size)
        if place < self._size:
            self._counts[place] += times
            return
        if self._size == len(self._ids):
            self._ids = np.resize(self._ids, 2 * self._size)
            self._counts = np.resize(self._counts, 2 * self._size)
        self._ids[place], self._counts[place] = token_id, times
        self._size += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        return self._ids[: self._size]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        return self._counts[: self._size]


class CountTables:
    """The counts of the requests of late, by identity of their owner."""

    def __init__(self) -> None:
        self._tables: OrderedDict[int, TokenCounts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tables)

    def of(self, rows: Sequence[HasHistory]) -> list[TokenCounts]:
        """The counts of each row, up to date."""
        found = []
        for row in rows:
            table = self._tables.get(id(row.owner)) or TokenCounts(row.owner)  # holds the owner: its id stays its own
            table.update(row)
            self._tables[id(row.owner)] = table
            self._tables.move_to_end(id(row.owner))
            found.append(table)
        while len(self._tables) > len(rows) + KEPT_TABLES:
            self._tables.popitem(last=False)
        return found


def apply_penalties(
    logits: Tensor, rows: Sequence[int], tables: Sequence[TokenCounts], settings: Sequence[SamplingParams]
) -> None:
    """Penalise, in place, rows `rows` of float32 logits [m, vocab] by their counts.

    Repetition divides positive and multiplies negative logits of every token of prompt and output (as transformers
    does); presence and frequency are subtracted for tokens of the output only (as OpenAI and vLLM do).
    """
    sizes = [len(table.ids) for table in tables]
    rules = [(rule.repetition_penalty, rule.presence_penalty, rule.frequency_penalty) for rule in settings]
    numbers = np.repeat(np.asarray(rules, dtype=np.float32), sizes, axis=0).T
    floats = np.concatenate([numbers, np.concatenate([table.counts for table in tables])[None]])
    where = np.stack([np.repeat(np.asarray(rows), sizes), np.concatenate([table.ids for table in tables])])
    repetition, presence, frequency, counts = torch.from_numpy(floats).to(logits.device, non_blocking=True)
    row, column = torch.from_numpy(where).to(logits.device, non_blocking=True)
    values = logits[row, column]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[row, column] = values - frequency * counts - presence * (counts > 0)
