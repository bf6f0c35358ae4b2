"""How many patches go through an MLP at a time."""

from __future__ import annotations

import pytest

from qvl.models.vision import MLP_ROWS, PART_ROWS, chunks


@pytest.mark.parametrize(
    "rows", [0, 4, MLP_ROWS, MLP_ROWS + 4, 2 * MLP_ROWS + 44, 3 * MLP_ROWS - 4, 8 * MLP_ROWS, 65_540]
)
def test_patches_go_in_parts_of_one_size(rows: int) -> None:
    parts = list(chunks(rows))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert len(parts) == -(-rows // MLP_ROWS)
    sizes = [part.stop - part.start for part in parts]
    assert all(size % PART_ROWS == 0 for size in sizes[:-1])
    assert max(sizes, default=0) <= MLP_ROWS
    assert max(sizes, default=0) - min(sizes, default=0) <= PART_ROWS * len(sizes)
