"""How many patches go through an MLP at a time."""

from __future__ import annotations

import pytest

from qvl.models.vision import LARGE, MLP_ROWS, PART_ROWS, chunks, mlp_rows


@pytest.mark.parametrize(
    "rows", [0, 4, MLP_ROWS, MLP_ROWS + 4, 2 * MLP_ROWS + 44, 3 * MLP_ROWS - 4, 8 * MLP_ROWS, 65_540]
)
def test_patches_go_in_parts_of_one_size(rows: int) -> None:
    most = mlp_rows(rows)
    assert most == (MLP_ROWS if rows <= LARGE else MLP_ROWS // 2)
    parts = list(chunks(rows, most))
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    assert len(parts) == -(-rows // most)
    sizes = [part.stop - part.start for part in parts]
    assert all(size % PART_ROWS == 0 for size in sizes[:-1])
    assert max(sizes, default=0) <= most
    assert max(sizes, default=0) - min(sizes, default=0) <= PART_ROWS * len(sizes)
