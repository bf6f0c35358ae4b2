"""Optimiser: Muon (orthogonalised momentum) for the matrices, AdamW for the rest. Equal shapes are stepped together."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix, batched; [n, r, c]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if g.is_cuda else g
    tall = x.shape[1] > x.shape[2]
    x = x.transpose(1, 2) if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.transpose(1, 2)
        x = a * x + (b * s + c * s @ s) @ x
    return (x.transpose(1, 2) if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: Tensor, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[tuple(parameter.shape)].append(parameter)
            for shape, parameters in shapes.items():
                self._step_shape(group, shape, parameters)

    def _step_shape(self, group: dict[str, Any], shape: tuple[int, ...], parameters: list[nn.Parameter]) -> None:
        gradients = torch.stack([parameter.grad for parameter in parameters])  # type: ignore[misc]
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        average = state["momentum"]
        average.lerp_(gradients, 1 - group["momentum"])
        update = orthogonalise(gradients.lerp(average, group["momentum"]))
        update = update * (-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)
        keep = 1 - group["lr"] * group["decay"]
        new = torch.stack(list(parameters)) * keep + update
        torch._foreach_copy_(list(parameters), list(new.unbind(0)))


def make_optimizers(
    model: nn.Module, extra: nn.Module, muon_lr: Tensor, adam_lr: Tensor
) -> list[torch.optim.Optimizer]:
    """Matrices inside blocks, layers and the merger to Muon; embeddings, norms, biases and training heads to AdamW."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inner = any(part in name for part in (".blocks.", ".layers.", ".merger."))
        (matrices if parameter.ndim == 2 and inner else rest).append(parameter)
    adam = torch.optim.AdamW(
        [{"params": rest}, {"params": list(extra.parameters())}],
        lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=adam_lr.is_cuda, capturable=adam_lr.is_cuda,
    )  # fmt: skip
    return [Muon(matrices, lr=muon_lr), adam]
