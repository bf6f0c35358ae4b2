"""Memory for parameters: one piece where that saves some, and every tensor has its own part of it."""

from __future__ import annotations

import torch

from qvl.models.parameters import ALIGNMENT, carve

SHAPES = ((3, 5), (7,), (1,), (256, 3))


def test_every_tensor_has_its_own_part() -> None:
    wanted = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in SHAPES]
    wanted.append(torch.empty(9, 2, dtype=torch.float32, device="meta"))
    parts = carve(wanted, torch.device("cpu"))
    assert [(part.shape, part.dtype) for part in parts] == [(want.shape, want.dtype) for want in wanted]
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert all((part.data_ptr() - parts[0].data_ptr()) % ALIGNMENT == 0 for part in parts)
    for number, part in enumerate(parts):
        part.fill_(number)
    assert all((part == number).all() for number, part in enumerate(parts))


def test_nothing_takes_nothing() -> None:
    assert carve([], torch.device("cpu")) == []
