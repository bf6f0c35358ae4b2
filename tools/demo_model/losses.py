"""One training step's numbers: the text loss and three losses that exist in training only.

- characters: a linear head on every vision token names the characters or the shape centred in it, left to right;
- pointing: the first head of one layer must look at the vision token that holds the character about to be written;
- place: a linear head on every vision token tells where in its picture it is.

Reading does not emerge in reasonable time without them; the checkpoint does not contain them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model import augment, shapes
from tools.demo_model.feed import Batch, groups
from tools.demo_model.model import DemoModel, Linear
from tools.demo_model.vocab import NUM_CLASSES

WATCHED_LAYER = 3
CLASSES = NUM_CLASSES + len(shapes.CLASS_OF)


class Heads(nn.Module):
    """The training-only heads."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.characters = Linear(hidden_size, augment.SLOTS_PER_TOKEN * CLASSES)
        self.place = Linear(hidden_size, 2)


@dataclass
class Prepared:
    """A batch with noise added: patches per group of grids, and targets moved along."""

    patches: list[tuple[Tensor, int, int]]  # ([b, slots, patches, width], rows, columns)
    characters: Tensor  # [b, vision tokens, SLOTS]
    place: Tensor  # [vision tokens, 2]
    looked_at: Tensor  # [b, l]: sequence position of the vision token to look at, or -1


def prepare(batch: Batch, dtype: torch.dtype, strength: float | Tensor) -> Prepared | None:
    """None when the batch has no pictures."""
    grids = batch.recipe.grids
    if not grids:
        return None
    video, steady = batch.recipe.sort == "video", batch.arrays["steady"]
    points = batch.arrays["points"]
    slot = points[..., 0].long().clamp_min(0)
    xy, patches, first = points[..., 1:3].clone(), [], 0
    for (rows, columns), raw in zip([grid for grid, _ in groups(grids)], batch.pixels, strict=True):
        b, slots, frames, height, width, _ = raw.shape
        pixels = raw.permute(0, 1, 2, 5, 3, 4).float().flatten(0, 2)  # [b * slots * frames, 3, h, w]
        warp = augment.random_warp(b * slots, steady.repeat_interleave(slots), strength, raw.device)
        if video:  # the camera does not jump
            first_of = torch.arange(b * slots, device=raw.device) // slots * slots
            warp = augment.Warp(warp.matrix[first_of], warp.shift[first_of])
        every = augment.Warp(warp.matrix.repeat_interleave(frames, 0), warp.shift.repeat_interleave(frames, 0))
        pixels = augment.spoil(augment.warp_pixels(pixels, every), strength)
        parts = augment.patchify(pixels.view(b * slots, frames, 3, height, width), dtype)
        patches.append((parts.view(b, slots, *parts.shape[1:]), rows, columns))
        for n in range(slots):
            own = augment.Warp(warp.matrix.view(b, slots, 2, 2)[:, n], warp.shift.view(b, slots, 2)[:, n])
            moved = augment.warp_points(points[..., 1:3], own, width, height)
            xy = torch.where((slot == first + n)[..., None], moved, xy)
        first += slots
    token = augment.token_of(xy, slot, grids, points[..., 0] >= 0)
    total = sum(rows * columns for rows, columns in grids)
    characters = augment.character_targets(token, xy[..., 0], points[..., 3].long(), total)
    return Prepared(patches, characters, _places(grids, token.device), _looked_at(batch, token))


def _places(grids: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    parts = []
    for rows, columns in grids:
        y = (torch.arange(rows, device=device) + 0.5) / rows
        x = (torch.arange(columns, device=device) + 0.5) / columns
        parts.append(torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).view(-1, 2))
    return torch.cat(parts)


def _looked_at(batch: Batch, token: Tensor) -> Tensor:
    refs = batch.arrays["refs"]
    index = token.gather(1, refs.clamp_min(0))
    position = batch.arrays["vision"].gather(1, index.clamp_min(0))
    return torch.where((refs >= 0) & (index >= 0), position, -1)


def character_loss(features: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """Summed over tokens and divided by the number of characters; empty places count a little."""
    logits = F.linear(features, weight.to(features.dtype), bias.to(features.dtype))
    logits = logits.view(-1, CLASSES)
    losses = F.cross_entropy(logits.float(), target.reshape(-1), reduction="none")
    shown = (target.reshape(-1) > 0).float()
    return (losses * (0.25 + 0.75 * shown)).sum() / shown.sum().clamp_min(1.0)


def pointing_loss(scores: Tensor, looked_at: Tensor) -> Tensor:
    """Mean negative log attention on the right token, over the positions that have one."""
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    logs = scores.float().masked_fill(~mask, -1e9)
    picked = logs.gather(2, looked_at.clamp_min(0)[..., None])[..., 0] - logs.logsumexp(-1)
    valid = (looked_at >= 0).float()
    return -(picked * valid).sum() / valid.sum().clamp_min(1.0)


def text_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight.to(hidden.dtype)).float(), target)


def step_losses(
    model: DemoModel, heads: Heads, batch: Batch, dtype: torch.dtype, strength: float | Tensor
) -> dict[str, Tensor]:
    """All losses of one batch, freshly spoiled."""
    with torch.no_grad():
        ready = prepare(batch, dtype, strength)
    arrays = batch.arrays
    features = model.see(ready.patches) if ready else None
    x = model.embed(arrays["ids"], features, arrays["vision"]).to(dtype)
    hidden, scores = model.decode(x, arrays["positions"], WATCHED_LAYER if ready else None)
    rows = hidden.flatten(0, 1)[arrays["rows"]]
    losses = {"text": text_loss(rows, model.model.embed_tokens.weight, arrays["row_labels"])}
    if ready and features is not None and scores is not None:
        head = heads.characters
        losses["characters"] = character_loss(features, head.weight, head.bias, ready.characters)
        losses["pointing"] = pointing_loss(scores, ready.looked_at)
        losses["place"] = F.mse_loss(heads.place(features).float(), ready.place.expand(features.shape[0], -1, -1))
    return losses
