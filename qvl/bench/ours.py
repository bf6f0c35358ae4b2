"""qvl's engine as a subject of measurement: requests go in as the server would put them in, steps are timed.

Knows the engine's interface. Does not know what is compared.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from qvl.bench.measure import Pixels, Prompt
from qvl.engine.config import EngineConfig
from qvl.engine.engine import Engine
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.errors import RequestFailed
from qvl.media.load import LoadedMedia, load
from qvl.types import MediaPart, PixelLimits, SamplingParams


class QvlSubject:
    """The engine of `config`."""

    def __init__(self, config: EngineConfig, name: str = "qvl") -> None:
        self.name = name
        self.engine = Engine(config)
        self._config = config
        self._ids = itertools.count()
        self._generation = config.spec.generation
        self.last_tokens: list[int] = []

    def generate(self, prompt: Prompt, num_tokens: int) -> list[float]:
        """As `Subject.generate`: decoding and resizing the picture counts, as it does for a user."""
        start = time.perf_counter()
        self._add(prompt, num_tokens)
        times: list[float] = []
        self.last_tokens = []
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error is not None:
                    raise RequestFailed(output.error)
                self.last_tokens += output.token_ids
                times += [time.perf_counter() - start] * len(output.token_ids)
        return times

    def generate_together(self, prompts: Sequence[Prompt], num_tokens: int) -> list[float]:
        """As `Crowd.generate_together`; steps that still compute prompts do not count."""
        for prompt in prompts:
            self._add(prompt, num_tokens)
        times: list[float] = []
        started = False
        while self.engine.has_work:
            start = time.perf_counter()
            outputs = self.engine.step()
            if any(output.error is not None for output in outputs):
                raise RequestFailed(next(output.error for output in outputs if output.error is not None))
            complete = len(outputs) == len(prompts)
            if complete and started:
                times.append(time.perf_counter() - start)
            started = complete
        return times

    def _add(self, prompt: Prompt, num_tokens: int) -> None:
        token_ids, media, pixels = self._place_picture(prompt)
        greedy = SamplingParams(max_tokens=num_tokens, temperature=0.0, repetition_penalty=1.0, ignore_eos=True)
        sampling = self._generation.fill(greedy, num_tokens)
        self.engine.add(AddRequest(f"bench-{next(self._ids)}", token_ids, media, sampling), pixels)

    def _place_picture(self, prompt: Prompt) -> tuple[list[int], list[MediaInput], Sequence[Pixels]]:
        if prompt.picture is None:
            return list(prompt.token_ids), [], []
        loaded = self._load(prompt.picture)
        ids = self._config.spec.ids
        pads = [ids.vision_start, *[ids.image_pad] * loaded.num_tokens, ids.vision_end]
        grid = loaded.grid
        place = MediaInput(
            "image", 1, loaded.num_tokens, grid.t, grid.h, grid.w, loaded.digest, loaded.height, loaded.width
        )
        return [*pads, *prompt.token_ids], [place], [np.ascontiguousarray(loaded.pixels)]

    def _load(self, picture: Pixels) -> LoadedMedia:
        spec, policy = self._config.spec.processor, self._config.policy
        return load(MediaPart("image", picture), spec, policy, PixelLimits(), resize_here=self._config.device == "cpu")
