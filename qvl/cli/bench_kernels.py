"""`qvl bench kernels`: every GPU kernel beside torch's and beside what the GPU could do. Knows flags and printing."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from qvl.cli.version import installed
from qvl.errors import ConfigError

SECTIONS = ("products", "attention", "pictures", "between", "fp8")
ALL = (*SECTIONS, "tuning")


def kernels(
    shape: Annotated[str, typer.Option(help="2b, 7b or 72b.")] = "7b",
    only: Annotated[
        str | None, typer.Option(help=f"Sections, separated by commas: {', '.join(ALL)} [default: all but tuning]")
    ] = None,
) -> None:
    """Measure the GPU kernels at the shapes of a published Qwen2-VL. The last line is one JSON object."""
    sections = SECTIONS if only is None else tuple(only.split(","))
    unknown = [name for name in sections if name not in ALL]
    if unknown:
        raise ConfigError(f"--only knows {', '.join(ALL)}, not '{unknown[0]}'")
    import torch

    from qvl.bench.shape import SHAPES

    if shape not in SHAPES:
        raise ConfigError(f"--shape knows {', '.join(SHAPES)}, not '{shape}'")
    if not torch.cuda.is_available():
        raise ConfigError("'qvl bench kernels' measures a GPU, and there is none here")
    _measure(shape, sections)


def _measure(shape: str, sections: tuple[str, ...]) -> None:
    import torch

    from qvl.bench.gpu_timing import measure_ceilings
    from qvl.bench.kernels import measure
    from qvl.bench.machine import describe

    with torch.inference_mode():
        ceilings = measure_ceilings()
        print(f"{ceilings.bandwidth / 1e12:.2f} TB/s copied, {ceilings.operations / 1e12:.0f} TFLOP/s in bfloat16")
        rows = []
        for section in sections:
            for row in measure(shape, section):
                print(row.line(ceilings), flush=True)
                rows.append(row)
    record = {
        "bench": "kernels",
        "shape": shape,
        "machine": describe("cuda"),
        "versions": {name: installed(name) for name in ("qvl", "torch", "triton")},
        "ceilings": dataclasses.asdict(ceilings),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    print(json.dumps(record))
