"""The register of paged attention implementations, and the one function that chooses.

Knows which implementations exist and what each needs. Does not know layers. A new one is a file beside this and one
entry in `CANDIDATES`, before the universal one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from qvl.errors import ConfigError
from qvl.kernels.gpu import (
    BF16_FROM,
    HOPPER,
    OLDEST,
    Capability,
    gpu_problem,
    problem_of_trial,
    shared_memory,
    tiles_for,
    tried_out,
    warn_of,
)
from qvl.kernels.on_cpu import paged_attention as cpu_attention
from qvl.kernels.sdpa import GatherAttention
from qvl.kernels.trial import problem_of
from qvl.layers.attention import Heads, PagedAttention

if TYPE_CHECKING:  # importing it imports Triton
    from qvl.kernels.on_gpu.paged_attention import TritonAttention

HEAD_DIMS = (16, 32, 64, 128, 256)
SLOWER_PROMPTS = "another kernel is used instead: attention in long prompts takes about a third longer"
SLOWER = "attention takes several times longer, and decoding cannot be recorded in CUDA graphs"


class Unavailable(Exception):
    """Why an implementation cannot run there."""


# A candidate gives (implementation, reason) or raises Unavailable.
Candidate = Callable[[torch.device, torch.dtype, Heads, Capability], tuple[PagedAttention, str]]


def compiled_cpu(
    device: torch.device, dtype: torch.dtype, heads: Heads, capability: Capability
) -> tuple[PagedAttention, str]:
    """Compiled kernels on a CPU that has a compiler."""
    if device.type != "cpu" or dtype != torch.float32:
        raise Unavailable("it computes fp32 on a CPU")
    chosen = cpu_attention.choose(heads.head_dim)
    if chosen is None:
        raise Unavailable("no compiled kernels, or a head_dim that does not fill their vectors")
    return chosen


@functools.cache
def triton_gpu(
    device: torch.device, dtype: torch.dtype, heads: Heads, capability: Capability
) -> tuple[PagedAttention, str]:
    """Triton's kernels on a GPU; they are tried out once, before they are trusted."""
    shown = ".".join(map(str, capability))
    if device.type != "cuda":
        raise Unavailable("it needs a CUDA GPU")
    if capability < (BF16_FROM if dtype == torch.bfloat16 else OLDEST):
        raise Unavailable(f"{str(dtype).removeprefix('torch.')} on compute capability {shown}")
    if heads.head_dim not in HEAD_DIMS:
        raise Unavailable(f"head_dim {heads.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}")
    problem = gpu_problem()
    if problem is not None:
        raise Unavailable(problem)
    from qvl.kernels.on_gpu.paged_attention import TritonAttention

    tiles = tiles_for(capability, dtype, heads.head_dim)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    def trial(prompts: ModuleType | None) -> str | None:
        return problem_of(TritonAttention(heads, tiles, multiprocessors, prompts), heads, device, dtype)

    prompts = None
    if capability == HOPPER and heads.head_dim == 128:
        prompts = tried_out("attention_prompts", "the attention kernel for prompts", trial, SLOWER_PROMPTS)
    problem = problem_of_trial("the attention kernel", lambda: trial(None)) if prompts is None else None
    if problem is not None:
        raise Unavailable(warn_of(problem, SLOWER))
    attention = TritonAttention(heads, tiles, multiprocessors, prompts)
    return attention, f"triton on compute capability {shown}: {words_for(capability, attention)}"


def words_for(capability: Capability, attention: TritonAttention) -> str:
    """What runs there, for the operator."""
    kib, rows = shared_memory(capability) // 1024, attention.tiles.rows
    if attention.prompts is not None:
        return f"paged split-KV decoding and paged prefill ({rows}-row tiles, 128-row tiles by TMA for long prompts)"
    if attention.tiles.tensor_cores:
        return f"paged split-KV decoding and paged prefill ({rows}-row tiles, {kib} KiB of shared memory)"
    return "paged split-KV decoding; torch SDPA for prefill (Triton has no tensor cores for this GPU and precision)"


def universal(
    device: torch.device, dtype: torch.dtype, heads: Heads, capability: Capability
) -> tuple[PagedAttention, str]:
    """torch's own operations run everywhere."""
    return GatherAttention(), f"gather+sdpa: torch operations, the implementation for every device ({device.type})"


CANDIDATES: dict[str, Candidate] = {"cpu": compiled_cpu, "triton": triton_gpu, "sdpa": universal}


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    heads: Heads,
    capability: Capability | None = None,
    backend: str = "auto",
) -> tuple[PagedAttention, str]:
    """The implementation asked for, or the first that runs on this device; and why. ConfigError: it cannot run."""
    if backend != "auto":
        try:
            attention, reason = CANDIDATES[backend](device, dtype, heads, capability or (0, 0))
        except Unavailable as error:
            raise ConfigError(
                f"'attention_backend' {backend} cannot run here: {error}", param="attention_backend"
            ) from None
        return attention, f"{reason}; as asked for"
    declined = []
    for name, candidate in CANDIDATES.items():
        try:
            attention, reason = candidate(device, dtype, heads, capability or (0, 0))
        except Unavailable as error:
            if name == "triton" and device.type == "cuda":
                declined.append(f"; no {name} because: {error}")
            continue
        return attention, reason + "".join(declined)
    raise AssertionError("the universal implementation declines nothing")
