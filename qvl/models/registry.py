"""The register of networks: the architecture name of a config.json and the class that computes it.

Knows names. Does not import a network before it is asked for. A new model is one file and one line here.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch

from qvl.errors import ConfigError

if TYPE_CHECKING:
    from qvl.models.qwen2_vl import Qwen2VLForConditionalGeneration
    from qvl.specs import ModelSpec

ARCHITECTURES: Mapping[str, str] = MappingProxyType({"Qwen2VLForConditionalGeneration": "qvl.models.qwen2_vl"})


def model_class(architecture: str) -> type[Qwen2VLForConditionalGeneration]:
    """The class of an architecture; ConfigError lists what there is."""
    module = ARCHITECTURES.get(architecture)
    if module is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"the architecture '{architecture}' is not supported; supported: {known}")
    found: type[Qwen2VLForConditionalGeneration] = getattr(importlib.import_module(module), architecture)
    return found


def build_model(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device | str,
    quantization: str = "none",
    attention_backend: str = "auto",
) -> Qwen2VLForConditionalGeneration:
    """The network of a checkpoint, without weights yet."""
    return model_class(spec.architecture)(spec, dtype, device, quantization, attention_backend)
