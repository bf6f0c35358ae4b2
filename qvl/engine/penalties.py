"""Which tokens a request has used so far, counted on the device, and the three penalties that read the counts.

Knows token histories. Does not know where logits come from, nor when a request ends: the table is a cache, and a row
that was given away is rebuilt from the history that its owner hands in again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qvl.types import SamplingParams


class HasHistory(Protocol):
    """What the table needs of a row: whose it is, and its tokens (the first `num_prompt_tokens` are the prompt)."""

    @property
    def owner(self) -> object: ...
    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def sampling(self) -> SamplingParams: ...


def wants_penalties(sampling: SamplingParams) -> bool:
    """Whether any of the three penalties changes the logits."""
    return (
        sampling.repetition_penalty not in (None, 1.0)
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )


class TokenCounts:
    """One table row per request with penalties, [rows, vocab]: seen in the prompt (bool), count in the output (int32).

    Grows by doubling to the largest number of rows that one step ever had; 5 bytes per row and vocabulary entry.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.in_prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self.in_output = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._owners: list[object | None] = []
        self._num_counted: list[int] = []

    def rows_of(self, histories: Sequence[HasHistory]) -> list[int]:
        """Table rows of these requests, brought up to date with their tokens."""
        slots = self._assign([history.owner for history in histories])
        prompt_rows, prompt_ids, output_rows, output_ids = [], [], [], []
        for slot, history in zip(slots, histories, strict=True):
            counted, start, end = self._num_counted[slot], history.num_prompt_tokens, len(history.token_ids)
            if counted < start:
                fresh = np.unique(np.asarray(history.token_ids[:start], dtype=np.int64))
                prompt_ids.append(fresh)
                prompt_rows.append(np.full(len(fresh), slot))
            new = np.asarray(history.token_ids[max(counted, start) : end], dtype=np.int64)
            output_ids.append(new)
            output_rows.append(np.full(len(new), slot))
            self._num_counted[slot] = end
        if prompt_ids:
            self.in_prompt[self._tensor(prompt_rows), self._tensor(prompt_ids)] = True
        where = (self._tensor(output_rows), self._tensor(output_ids))
        self.in_output.index_put_(where, torch.ones((), dtype=torch.int32, device=self.device), accumulate=True)
        return slots

    def _assign(self, owners: Sequence[object]) -> list[int]:
        """A table row for every owner: its own, or one whose owner is not in this step, or a new one."""
        known = {id(owner): slot for slot, owner in enumerate(self._owners) if owner is not None}
        slots = [known.get(id(owner), -1) for owner in owners]
        taken = set(slots)
        spare = [slot for slot in range(len(self._owners)) if slot not in taken]
        missing = slots.count(-1)
        if missing > len(spare):
            spare += self._grow(missing - len(spare))
        for i, owner in enumerate(owners):
            if slots[i] < 0:
                # Rows of owners that are away are the oldest first, so a preempted request usually keeps its counts.
                slots[i] = spare.pop(0)
                self._clear(slots[i], owner)
        return slots

    def _grow(self, at_least: int) -> list[int]:
        old = len(self._owners)
        new = old + max(at_least, old)
        for name in ("in_prompt", "in_output"):
            table: Tensor = getattr(self, name)
            wider = torch.zeros((new, self.vocab_size), dtype=table.dtype, device=self.device)
            wider[:old] = table
            setattr(self, name, wider)
        self._owners += [None] * (new - old)
        self._num_counted += [0] * (new - old)
        return list(range(old, new))

    def _clear(self, slot: int, owner: object) -> None:
        self._owners[slot] = owner
        self._num_counted[slot] = 0
        self.in_prompt[slot] = False
        self.in_output[slot] = 0

    def _tensor(self, parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(self.device, non_blocking=True)


def apply_penalties(logits: Tensor, counts: TokenCounts, slots: Tensor, settings: Tensor) -> Tensor:
    """Penalised logits [r, vocab] of rows whose table rows are `slots` [r].

    `settings` [3, r] holds repetition, presence and frequency. Repetition divides positive and multiplies negative
    logits of every token of prompt and output (as transformers does); presence and frequency are subtracted for tokens
    of the output only (as OpenAI and vLLM do).
    """
    repetition, presence, frequency = settings[:, :, None].unbind(0)
    in_output = counts.in_output[slots]
    used = in_output > 0
    repeated = used | counts.in_prompt[slots]
    factor = torch.where(logits > 0, 1.0 / repetition, repetition)
    logits = torch.where(repeated, logits * factor, logits)
    return logits - frequency * in_output - presence * used
