"""Where the time of an engine goes: pictures, prompts, steps of decodes, choices of tokens, and the host beside them.

Knows the engine's parts and how to wait for a device. Does not know who prints.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qvl.bench.measure import Workload
from qvl.bench.ours import QvlSubject
from qvl.engine.config import EngineConfig
from qvl.engine.protocol import AddRequest
from qvl.engine.runner import Flight
from qvl.engine.sampler import SamplerRow
from qvl.engine.transfer import on_device
from qvl.errors import RequestFailed
from qvl.models.preprocess import patchify
from qvl.types import Grid, SamplingParams

MILLI = 1000.0
STEPS = 32  # of decodes that are timed
RULES = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.05},
}


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the table: a stage, its median in ms, and what else is known about it."""

    stage: str
    ms: float
    note: str = ""


@dataclass(slots=True)
class Stages:
    """Measures the engine of `config`, stage by stage; `lines` grow as it goes."""

    config: EngineConfig
    workload: Workload
    usable_ids: Sequence[int]
    tell: Callable[[str], None]
    lines: list[Line] = field(default_factory=list)

    def measure(self, batches: Sequence[int]) -> list[Line]:
        """All stages; `batches` are numbers of sequences that decode at a time."""
        started = time.perf_counter()
        subject = QvlSubject(self.config)
        engine = subject.engine
        room = f"{engine.info.kv_tokens} KV tokens"
        self._say("start: weights, kernels, graphs", [time.perf_counter() - started], room)
        if self.workload.picture is not None:
            self._pictures(subject, *self.workload.picture)
        self._prompts(subject)
        for batch in batches:
            self._decodes(subject, batch, "graph" if self._has_graphs(subject) else "eager")
        if self._has_graphs(subject):
            engine.runner.prepare_static(None)
            for batch in batches:
                self._decodes(subject, batch, "eager")
        for batch in batches:
            self._choices(subject, batch)
        return self.lines

    def _has_graphs(self, subject: QvlSubject) -> bool:
        decodes = subject.engine.runner.decodes
        return decodes is not None and bool(decodes.replays)

    def _say(self, stage: str, seconds: Sequence[float], note: str = "") -> None:
        self.lines.append(Line(stage, statistics.median(seconds) * MILLI, note))
        self.tell(f"{stage}: {self.lines[-1].ms:.3f} ms {note}")

    def _repeat(self, work: Callable[[], object]) -> list[float]:
        """Seconds of each repetition, the device's work included; the first does not count."""
        device = self.config.device
        times = []
        for _ in range(self.workload.repeats + 1):
            wait_for(device)
            start = time.perf_counter()
            work()
            wait_for(device)
            times.append(time.perf_counter() - start)
        return times[1:]

    @torch.inference_mode()
    def _pictures(self, subject: QvlSubject, height: int, width: int) -> None:
        runner, spec = subject.engine.runner, self.config.spec
        factor, patch = spec.vision.factor, spec.vision.patch_size
        tall, wide = max(1, round(height / factor)) * factor, max(1, round(width / factor)) * factor
        grid = Grid(1, tall // patch, wide // patch)
        pixels = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        dtype = runner.model.compute_dtype

        def prepare() -> torch.Tensor:
            return patchify(on_device(pixels, runner.device), tall, wide, spec.processor, dtype)

        name = f"{width}x{height}"
        self._say(f"preprocess {name}", self._repeat(prepare), "copy, resize, normalise, patches")
        patches = prepare()
        encode = self._repeat(lambda: runner.model.encode_media(patches, [grid]))
        self._say(f"vision tower {name}", encode, f"{grid.num_patches} patches")
        together = max(1, min(8, runner.encoder.max_patches // grid.num_patches))
        if together > 1:
            many = torch.cat([patches] * together)
            encode = self._repeat(lambda: runner.model.encode_media(many, [grid] * together))
            self._say(f"vision tower {together} x {name}", [seconds / together for seconds in encode], "a picture")

    def _prompts(self, subject: QvlSubject) -> None:
        """From a request to its first token, inside the engine."""
        for length in sorted({min(147, self.workload.prompt_tokens), self.workload.prompt_tokens}):
            times = []
            for _ in range(self.workload.repeats + 1):
                start = time.perf_counter()
                self._add(subject, length, 1)
                for _ in self._steps(subject):
                    pass
                times.append(time.perf_counter() - start)
            self._say(f"prompt of {length}", times[1:], "request to first token")

    def _decodes(self, subject: QvlSubject, batch: int, how: str) -> None:
        for _ in range(batch):
            length = self.workload.prompt_tokens
            self._add(subject, length, self.config.max_model_len - length - 1)  # none ends before the last one begins
        seconds, host = [], []
        engine = subject.engine
        waited: list[float] = []
        collect = engine.runner.collect

        def timed(flight: Flight) -> object:
            start = time.perf_counter()
            result = collect(flight)
            waited.append(time.perf_counter() - start)
            return result

        engine.runner.collect = timed  # type: ignore[method-assign, assignment]
        full = 0
        while full < STEPS + 4:
            if not engine.has_work:
                raise RequestFailed(f"of {batch} answers some ended before {STEPS} steps of all of them")
            waited.clear()
            start = time.perf_counter()
            full = full + 1 if len(engine.step()) == batch else 0
            if full > 4:  # the pipeline is in its stride
                seconds.append(time.perf_counter() - start)
                host.append(seconds[-1] - sum(waited))
        engine.runner.collect = collect  # type: ignore[method-assign]
        for name in [seq.request_id for seq in (*engine.scheduler.running, *engine.scheduler.waiting)]:
            engine.abort(name)
        for _ in self._steps(subject):
            pass
        told = f"{batch / statistics.median(seconds):,.0f} tok/s"
        if self.config.device == "cuda":  # elsewhere the host is who computes
            told += f"; host {statistics.median(host) * MILLI:.2f} ms of it"
        self._say(f"decode step of {batch}, {how}", seconds, told)

    @torch.inference_mode()
    def _choices(self, subject: QvlSubject, batch: int) -> None:
        runner = subject.engine.runner
        vocab = self.config.spec.text.vocab_size
        logits = torch.randn(batch, vocab, device=runner.device).to(runner.model.compute_dtype)
        for name, rule in RULES.items():
            neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, **rule}
            params = SamplingParams(**neutral)  # type: ignore[arg-type]
            lengths = itertools.count(2)

            def choose(params: SamplingParams = params, lengths: Iterator[int] = lengths) -> None:
                length = next(lengths)
                rows = [SamplerRow(i, params, i, params, i, (), [1] * length, 1, length) for i in range(batch)]
                ruled = [] if params.temperature == 0.0 and params.repetition_penalty == 1.0 else rows
                runner.sampler.draw(logits, runner.sampler.best(logits), ruled).fetch().wait()

            self._say(f"choice of {batch}, {name}", self._repeat(choose))

    def _add(self, subject: QvlSubject, length: int, answer: int) -> None:
        ids = random.choices(self.usable_ids, k=length)
        sampling = SamplingParams(
            max_tokens=answer, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, ignore_eos=True
        )
        subject.engine.add(AddRequest(f"stage-{random.getrandbits(64):x}", ids, [], sampling))

    def _steps(self, subject: QvlSubject) -> Iterator[None]:
        while subject.engine.has_work:
            subject.engine.step()
            yield


def wait_for(device: str) -> None:
    """Until a GPU has done everything."""
    if device == "cuda":
        torch.cuda.synchronize()
