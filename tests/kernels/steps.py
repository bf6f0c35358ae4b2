"""A step of sequences whose blocks lie scattered in a paged cache, so that no test passes by contiguity."""

from __future__ import annotations

import torch

from qvl.layers.attention import AttentionMetadata


def a_step(
    query: list[int],
    context: list[int],
    page: int,
    device: torch.device | str = "cpu",
    *,
    num_decodes: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[AttentionMetadata, int]:
    """Decodes first, all sequences of one token unless `num_decodes` says otherwise; and how many blocks there are.
    Entries of the table past the end point anywhere.
    """
    need = [max(1, -(-length // page)) for length in context]
    order = torch.randperm(sum(need), generator=generator).split(need)
    table = torch.zeros(len(need), max(need) + 3, dtype=torch.int32)
    slots = []
    for i, blocks in enumerate(order):
        table[i, : need[i]] = blocks
        at = torch.arange(context[i] - query[i], context[i])
        slots.append(blocks[at // page] * page + at % page)
    lengths = torch.tensor(context, dtype=torch.int32)
    lengths, table, where = (x.to(device) for x in (lengths, table, torch.cat(slots)))
    decodes = query.count(1) if num_decodes is None else num_decodes
    return AttentionMetadata(lengths, table, where, query, context, page, decodes), sum(need)
