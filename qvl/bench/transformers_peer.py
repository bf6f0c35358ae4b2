"""transformers as a subject of measurement, with the same checkpoint folder, precision and threads.

Knows transformers' interface, and is the only shipped module that does. It is imported only when somebody asks for the
comparison; transformers is no dependency of qvl.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from qvl.bench.measure import Prompt
from qvl.models.weights import dummy_block, fill_repeated
from qvl.specs import ModelSpec


class TransformersSubject:
    """The checkpoint in `spec.folder` as transformers runs it: eager, SDPA attention, dynamic cache."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype, device: torch.device, dummy: bool) -> None:
        self.name = f"transformers {transformers.__version__}"
        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._ids = spec.ids
        self._device = device
        self._model = _load(spec.folder, dtype, dummy).to(device).eval()
        # No token ends an answer: every run has exactly the tokens it was asked for, as qvl's with ignore_eos.
        self._model.generation_config.eos_token_id = None
        processor = spec.processor
        self._pictures = transformers.Qwen2VLImageProcessor(
            min_pixels=processor.min_pixels,
            max_pixels=processor.max_pixels,
            patch_size=processor.patch_size,
            temporal_patch_size=processor.temporal_patch_size,
            merge_size=processor.merge_size,
        )
        self._merge = processor.merge_size**2
        self.last_tokens: list[int] = []

    @torch.inference_mode()
    def generate(self, prompt: Prompt, num_tokens: int) -> list[float]:
        """As `Subject.generate`."""
        clock = _Clock()
        token_ids = list(prompt.token_ids)
        inputs: dict[str, Any] = {}
        if prompt.picture is not None:
            seen = self._pictures(images=[Image.fromarray(prompt.picture)], return_tensors="pt")
            inputs = {name: tensor.to(self._device) for name, tensor in seen.items()}
            pads = int(inputs["image_grid_thw"].prod()) // self._merge
            token_ids = [self._ids.vision_start, *[self._ids.image_pad] * pads, self._ids.vision_end, *token_ids]
        input_ids = torch.tensor([token_ids], device=self._device)
        if inputs and "mm_token_type_ids" in inspect.signature(self._model.forward).parameters:
            # From 5.x on it asks what stands where instead of looking for pads.
            inputs["mm_token_type_ids"] = (input_ids == self._ids.image_pad).int()
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            pad_token_id=self._ids.pad,
            stopping_criteria=[clock],
            **inputs,
        )
        self.last_tokens = output[0, len(token_ids) :].tolist()
        return clock.times


class _Clock:
    """Asked by transformers after every token whether to stop; notes the time and says no."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        # .tolist() waits for the device, as showing the token to a user would.
        input_ids[:, -1].tolist()
        self.times.append(time.perf_counter() - self._start)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _load(folder: Path, dtype: torch.dtype, dummy: bool) -> Any:
    """The model; `dummy` skips the files and takes the numbers that qvl takes then."""
    kind = transformers.Qwen2VLForConditionalGeneration
    if not dummy:
        return kind.from_pretrained(folder, torch_dtype=dtype)
    config = transformers.Qwen2VLConfig.from_pretrained(folder)
    with transformers.modeling_utils.no_init_weights():
        model = kind._from_config(config, torch_dtype=dtype)
    block = dummy_block().to(dtype)
    for parameter in model.parameters():
        fill_repeated(parameter.data.view(-1), block)
    return model
