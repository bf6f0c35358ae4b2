"""Memory for a network's parameters, in the form that each is held in. Does not know what goes into it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qvl.kernels.linear import Matrix
from qvl.kernels.on_cpu.large_pages import in_large_pages
from qvl.layers.linear import Linear
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration

ALIGNMENT = 512  # bytes, as torch aligns its own


def materialise(model: Qwen2VLForConditionalGeneration) -> None:
    """Memory for every parameter on the model's device (`Module.to_empty` would import 30 MB of tracing machinery)."""
    empty: list[tuple[nn.Module, str, Tensor]] = []
    for path, module in model.named_modules():
        form = model.form_of(path) if isinstance(module, Linear) else None
        if form is not None:
            assert isinstance(module, Linear)
            module.hold(form, model.device)
        parameters = module.named_parameters(recurse=False)
        empty += [(module, leaf, parameter) for leaf, parameter in parameters if parameter.is_meta]
    shapes = [parameter for _, _, parameter in empty]
    for (module, leaf, _), memory in zip(empty, allocate(shapes, model.device), strict=True):
        setattr(module, leaf, nn.Parameter(memory, requires_grad=False))


def allocate(shapes: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Memory for tensors of these shapes and dtypes. On a GPU in one piece: torch rounds each of its pieces up, which
    takes 234 MiB more for the 7B."""
    if device.type != "cuda":
        return [in_large_pages(torch.empty(shape.shape, dtype=shape.dtype, device=device)) for shape in shapes]
    return carve(shapes, device)


def carve(shapes: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """One piece of memory, cut into tensors that each begin where one of its own would."""
    sizes = [shape.numel() * shape.element_size() for shape in shapes]
    starts = list(itertools.accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))
    piece = torch.empty(starts.pop(), dtype=torch.uint8, device=device)
    return [
        piece[start : start + size].view(shape.dtype).view(shape.shape)
        for shape, start, size in zip(shapes, starts, sizes, strict=True)
    ]


def held_matrix(module: nn.Module, leaf: str) -> Matrix | None:
    """The matrix that stands for this parameter of the checkpoint, where it is held in another form."""
    return module.matrix if isinstance(module, Linear) and leaf == "weight" else None
