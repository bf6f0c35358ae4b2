"""All kernels of a model on a GPU, tried out at the same time: most of a first start is their compilation.

    thread  | attention of prompts and decodes ... |
    thread  | attention in pictures ...  |
    thread  | products of many rows ... |                      each compiles its own in more threads
    thread  | patches of pixels | choice of tokens ...  |
    main    | products of one row, of a few rows ... | wait | the network asks again, and finds all of it done

Knows which trials there are. Decides nothing: whoever uses a kernel asks for it, and hears there why it did not run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch

from qvl.engine.config import EngineConfig
from qvl.engine.device import DTYPES
from qvl.engine.gpu_sampler import sampling_kernels
from qvl.errors import ConfigError
from qvl.kernels.attention import choose_attention
from qvl.kernels.few_rows import few_rows
from qvl.kernels.gpu import capability_of, gpu_problem
from qvl.kernels.linear import compute_dtype_for, many_rows, one_row
from qvl.kernels.pixels import pixel_kernels
from qvl.kernels.segments import segment_kernel
from qvl.layers.attention import Heads

logger = logging.getLogger("qvl.engine")

Trial = Callable[[], object]
Trials = Mapping[str, Trial]


def try_kernels_out(config: EngineConfig, device: torch.device) -> None:
    """Compile, run and remember those that `config` may use on this GPU; elsewhere there is nothing to do."""
    if device.type == "cuda" and gpu_problem() is None:
        together(*trials(config, device))


def trials(config: EngineConfig, device: torch.device) -> tuple[Trials, Trials]:
    """Those for threads, and those for the caller's: cuBLAS, with which these compare, keeps 32 MiB for each thread."""
    spec, dtype = config.spec, compute_dtype_for(DTYPES[config.dtype], device)
    text = spec.text
    heads = Heads(text.num_heads, text.num_kv_heads, text.head_dim)
    never = tuple(spec.ids.never_sampled)
    return (
        {
            "attention": lambda: choose_attention(
                device, dtype, heads, capability_of(device), config.attention_backend
            ),
            "attention in pictures": lambda: segment_kernel(device, dtype, spec.vision.head_dim),
            "products of many rows": lambda: many_rows(device, dtype),
            "patches": lambda: pixel_kernels(spec.processor, dtype),
            "choice of tokens": lambda: sampling_kernels(text.vocab_size, never, device, dtype),
        },
        {
            "products of one row": lambda: one_row(device, dtype),
            "products of a few rows": lambda: few_rows(device, dtype),
        },
    )


def together(for_threads: Trials, for_caller: Trials) -> None:
    """Run them all. An implementation that was asked for and cannot run is told to whoever asks again."""
    began = time.monotonic()

    def run(name: str, trial: Trial) -> None:
        with contextlib.suppress(ConfigError):
            trial()
        logger.debug("tried out after %.2f s: %s", time.monotonic() - began, name)

    with ThreadPoolExecutor(len(for_threads), "qvl-trial") as threads:
        under_way = [threads.submit(run, name, trial) for name, trial in for_threads.items()]
        for name, trial in for_caller.items():
            run(name, trial)
    for trial_of_thread in under_way:
        trial_of_thread.result()
