"""A model's numbers: read once from its checkpoint folder, frozen, asked by everything that computes or plans."""

from __future__ import annotations

from qvl.specs.generation import GenerationDefaults
from qvl.specs.model import ModelSpec, ProcessorSpec, SpecialIds, TextSpec, VisionSpec
from qvl.specs.read import load_spec

__all__ = ["GenerationDefaults", "ModelSpec", "ProcessorSpec", "SpecialIds", "TextSpec", "VisionSpec", "load_spec"]
