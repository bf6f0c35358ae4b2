"""A checkpoint's tensors into a network's parameters, each used exactly once or named in an error.

Knows files, names and shapes; streams tensor by tensor so that the host holds the weights once. Does not know any
network: what names mean comes from the class (`RENAMES`, `MERGED`, `checkpoint_shapes`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from qvl.errors import CheckpointError
from qvl.kernels.linear import Matrix
from qvl.kernels.on_cpu.linear_pairs import PairMatrix
from qvl.layers.linear import Linear
from qvl.models.parameters import held_matrix, materialise
from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
from qvl.models.safetensors_file import DTYPES, Entry, SafetensorsFile

LoadFormat = Literal["auto", "safetensors", "dummy"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
QUANTISED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".absmax", ".quant_map")
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")  # buffers that old files carry; the network derives them
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NAMED_IN_ERRORS = 8
DUMMY_BOUND = 1e-3  # as vLLM and SGLang draw: what the numbers are changes the watts of a GPU, and so its speed
DUMMY_BLOCK = 1_048_573  # a prime: rows of a matrix do not repeat each other


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor of the checkpoint goes: rows [start, start + rows) of a parameter."""

    parameter: str
    start: int
    rows: int
    shape: tuple[int, ...]  # in the checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """Where one tensor comes from."""

    name: str  # as the file spells it
    file: SafetensorsFile
    entry: Entry


def load_weights(model: Qwen2VLForConditionalGeneration, folder: str | Path, load_format: LoadFormat = "auto") -> None:
    """Give every parameter of `model` its value from the safetensors files in `folder`, cast to the parameter's dtype
    in the form that `model.form_of` says: rounded to codes, or in pairs.

    "dummy" reads no file: fixed-seed small random numbers. CheckpointError names what is missing, unexpected,
    misshapen, truncated or quantised, before anything is allocated. The host's peak is the weights plus a few tens of
    megabytes.
    """
    if load_format == "dummy":
        materialise(model)
        fill_randomly(model)
        return
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in weight_files(Path(folder))]
        slots = expected_slots(model)
        sources = match(slots, rename(files, model.RENAMES), tied=model.spec.text.tie_word_embeddings)
        materialise(model)
        for name, slot in slots.items():
            path, _, leaf = slot.parameter.rpartition(".")
            copy(sources[name], model.get_submodule(path), leaf, slot)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, the shards of its index, or whatever there is."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return shards(folder)
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise CheckpointError(
            f"'{folder.name}' has its weights in pickle files (.bin); they can run code and are not read. "
            "Convert them to safetensors, or download the safetensors files of the same model"
        )
    if any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"'{folder.name}' has its weights as GGUF, which is not read; download the same model's safetensors files"
        )
    raise CheckpointError(f"'{folder.name}' has no weights: neither {SINGLE} nor {INDEX}")


def shards(folder: Path) -> list[Path]:
    """The files that the index names; all must exist and hold the tensors the index says."""
    try:
        weight_map: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{INDEX} is damaged: it names no file for each weight; download it again") from None
    bad = [name for name in names if Path(name).name != name]
    if bad:
        raise CheckpointError(f"{INDEX} names files outside its folder: {listed(bad)}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} weight files are missing: {listed(missing)}; download them"
        )
    for name in names:
        with SafetensorsFile(folder / name) as file:
            absent = [tensor for tensor, home in weight_map.items() if home == name and tensor not in file.entries]
        if absent:
            raise CheckpointError(f"{INDEX} expects tensors in {name} that are not there: {listed(absent)}")
    return [folder / name for name in names]


def expected_slots(model: Qwen2VLForConditionalGeneration) -> dict[str, Slot]:
    """Every tensor that a checkpoint of this network must have, by its (older) checkpoint name."""
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{leaf}"
            for name, start, rows in parts_of(path, leaf, module, parameter, model.MERGED):
                shape = model.checkpoint_shapes.get(name, (rows, *parameter.shape[1:]))
                slots[name] = Slot(full, start, rows, shape)
    return slots


def parts_of(
    path: str, leaf: str, module: nn.Module, parameter: Tensor, merged: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, int, int]]:
    """(checkpoint name, first row, rows) of each tensor that a parameter is made of."""
    parent, _, own = path.rpartition(".")
    if own not in merged or not isinstance(module, Linear):
        yield f"{path}.{leaf}", 0, parameter.shape[0]
        return
    start = 0
    for name, rows in zip(merged[own], module.parts, strict=True):
        yield f"{parent}.{name}.{leaf}", start, rows
        start += rows


def rename(files: Iterable[SafetensorsFile], renames: Iterable[tuple[str, str]]) -> dict[str, Source]:
    """All tensors of the files under one spelling; a tensor that occurs twice is an error."""
    renames = tuple(renames)
    sources: dict[str, Source] = {}
    for file in files:
        for name, entry in file.entries.items():
            canonical = next((new + name[len(old) :] for old, new in renames if name.startswith(old)), name)
            if canonical in sources:
                first = sources[canonical]
                where = f"'{first.name}' in {first.file.path.name} and '{name}' in {file.path.name}"
                raise CheckpointError(f"the same weight occurs twice: {where}")
            sources[canonical] = Source(name, file, entry)
    return sources


def match(slots: Mapping[str, Slot], sources: dict[str, Source], *, tied: bool) -> dict[str, Source]:
    """The sources, once they are exactly what the network needs; CheckpointError with names otherwise."""
    quantised = [source.name for source in sources.values() if source.name.endswith(QUANTISED)]
    if quantised:
        raise CheckpointError(
            f"this is a quantised checkpoint ({listed(quantised, 1)}), which this version of qvl does not support yet; "
            "use the unquantised checkpoint of the same model (without -AWQ or -GPTQ in its name)"
        )
    sources = {name: source for name, source in sources.items() if not name.endswith(COMPUTED)}
    if tied and HEAD in sources and HEAD not in slots:
        check_tied(sources.get(EMBEDDING), sources.pop(HEAD))
    problems = []
    missing = [name for name in slots if name not in sources]
    unexpected = [source.name for name, source in sources.items() if name not in slots]
    shared = [(source, slots[name]) for name, source in sources.items() if name in slots]
    shapes = [
        f"{source.name} {list(source.entry.shape)} instead of {list(slot.shape)}"
        for source, slot in shared
        if source.entry.shape != slot.shape
    ]
    types = [f"{source.name} {source.entry.dtype}" for source, _ in shared if source.entry.dtype not in DTYPES]
    for what, names in (
        ("missing", missing),
        ("not part of this model", unexpected),
        ("of the wrong shape", shapes),
        ("of a number type that is not supported", types),
    ):
        if names:
            problems.append(f"{len(names)} tensors are {what}: {listed(names)}")
    if problems:
        raise CheckpointError("the weights do not fit config.json: " + "; ".join(problems))
    return sources


def check_tied(embedding: Source | None, head: Source) -> None:
    """A tied checkpoint may carry its output matrix, as long as it says the same as the embedding."""
    if embedding is None:
        return  # reported as missing
    same = embedding.entry.shape == head.entry.shape and embedding.entry.dtype == head.entry.dtype
    pieces = zip(embedding.file.pieces(embedding.entry), head.file.pieces(head.entry), strict=False)
    if not same or not all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pieces):
        raise CheckpointError(
            f"config.json says tie_word_embeddings, but '{head.name}' differs from '{embedding.name}'; "
            "set tie_word_embeddings to false to use it, or remove the tensor"
        )


def copy(source: Source, module: nn.Module, leaf: str, slot: Slot) -> None:
    """One tensor into its rows of a parameter, piece by piece, cast or rounded on the way."""
    matrix = held_matrix(module, leaf)
    if matrix is not None:
        for start, piece in source.file.pieces(source.entry, matrix.width):
            matrix.write(slot.start + start // matrix.width, piece.view(-1, matrix.width))
        return
    parameter = module.get_parameter(leaf)
    target = parameter.data.narrow(0, slot.start, slot.rows).view(-1)
    assert target.numel() == math.prod(slot.shape), slot
    for start, piece in source.file.pieces(source.entry):
        target[start : start + piece.numel()].copy_(piece)


def fill_randomly(model: nn.Module) -> None:
    """The same small random numbers for the same network every time, in norms too, rounded where weights are.

    One block is drawn and repeated, because drawing billions of numbers takes minutes.
    """
    block = dummy_block()
    block_as = functools.cache(block.to)
    for module in model.modules():
        matrix = held_matrix(module, "weight")
        if isinstance(matrix, PairMatrix):
            write_repeated(matrix, block_as(matrix.numbers.device, matrix.numbers.dtype))
        elif matrix is not None:
            write_repeated(matrix, block_as(matrix.codes.device))
        for leaf, parameter in module.named_parameters(recurse=False):
            if matrix is None or leaf == "bias":
                fill_repeated(parameter.data.view(-1), block_as(parameter.device, parameter.dtype))


def dummy_block() -> Tensor:
    """What dummy weights repeat, in float32."""
    generator = torch.Generator().manual_seed(0)
    return torch.empty(DUMMY_BLOCK).uniform_(-DUMMY_BOUND, DUMMY_BOUND, generator=generator)


def fill_repeated(flat: Tensor, block: Tensor) -> None:
    """`block` over and over."""
    whole = flat.numel() // len(block) * len(block)
    flat[:whole].view(-1, len(block)).copy_(block)
    flat[whole:].copy_(block[: flat.numel() - whole])


def write_repeated(matrix: Matrix, block: Tensor) -> None:
    """The rows that `fill_repeated` would give an ordinary matrix."""
    count = max(1, len(block) // matrix.width)
    twice = block.repeat(2 + count * matrix.width // len(block))
    for row in range(0, matrix.rows, count):
        numbers = min(count, matrix.rows - row) * matrix.width
        start = row * matrix.width % len(block)
        matrix.write(row, twice[start : start + numbers].view(-1, matrix.width))


def listed(names: list[str], limit: int = NAMED_IN_ERRORS) -> str:
    """At most `limit` names, and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
