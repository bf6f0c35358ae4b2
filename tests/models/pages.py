"""What the runner does for a model, in a few lines for tests: pages, slots and positions of some sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qvl.layers.attention import AttentionMetadata, KVCache, make_kv_cache
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration


@dataclass
class Pages:
    """A cache whose blocks are dealt out in a shuffled order, so that no test passes by contiguity."""

    model: Qwen2VLForConditionalGeneration
    num_sequences: int
    blocks_each: int = 64
    block_size: int = 4
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        total = self.num_sequences * self.blocks_each
        order = torch.randperm(total, generator=torch.Generator().manual_seed(1))
        self.tables = order.view(self.num_sequences, self.blocks_each).int()
        self.cache: KVCache = make_kv_cache(self.model.spec.text, total, self.block_size, self.model.dtype, "cpu")
        self.lengths = [0] * self.num_sequences

    def step(self, chunks: Sequence[tuple[int, Tensor, Tensor]]) -> list[Tensor]:
        """(sequence, hidden [n, hidden], positions [3, n]) with single tokens first: hidden states out, per chunk."""
        return list(self.compute(chunks).split([hidden.shape[0] for _, hidden, _ in chunks]))

    def compute(self, chunks: Sequence[tuple[int, Tensor, Tensor]], rows: Tensor | None = None) -> Tensor:
        """The same, all chunks in one; only these rows of them when given."""
        counts = [hidden.shape[0] for _, hidden, _ in chunks]
        slots = []
        for (i, _, _), count in zip(chunks, counts, strict=True):
            index = torch.arange(self.lengths[i], self.lengths[i] + count)
            slots.append(self.tables[i].long()[index // self.block_size] * self.block_size + index % self.block_size)
            self.lengths[i] += count
        sequences = [i for i, _, _ in chunks]
        lengths = [self.lengths[i] for i in sequences]
        decodes = next((k for k, count in enumerate(counts) if count != 1), len(counts))
        metadata = AttentionMetadata(
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_table=self.tables[sequences],
            slot_mapping=torch.cat(slots),
            query_lens=counts,
            context_lens=lengths,
            block_size=self.block_size,
            num_decodes=decodes,
        )
        hidden = torch.cat([hidden for _, hidden, _ in chunks])
        positions = torch.cat([positions for _, _, positions in chunks], dim=1)
        return self.model(hidden, positions, self.cache, metadata, rows)
