"""What a bound on prompts beside answers does, before a GPU is there: `python tools/simulate_steps.py FOLDER [BOUNDS]`.

The real scheduler, one step ahead, plans for many clients that ask again as soon as they are answered; a step takes as
long as an H200 with the 7B, which is at its power cap, needs for its joules (`tools/measure_energy.py` read them). A
model, not a measurement. FOLDER: from `qvl bench shape 7b FOLDER`.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.engine.batch import ScheduledBatch, StepResult
from qvl.engine.block_manager import BlockManager
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.engine.scheduler import Scheduler
from qvl.engine.sequence import Sequence
from qvl.specs import ModelSpec, load_spec
from qvl.types import SamplingParams

WATTS, SHORTEST = 690, 4.3  # at the cap; ms of the shortest step
ROWS = [0, 32, 64, 128, 256, 512, 768, 1024, 1454, 2304, 8192]  # of a step's products, and their joules
JOULES = [2.3, 2.3, 2.6, 3.1, 4.06, 7.3, 10.7, 14.4, 20.1, 31.3, 111.0]
TOWER, PATCH, PATCH_PAIR = 0.5, 1.52e-3, 2.32e-7  # joules of any tower, of a patch of it, of two of one picture
KV_BYTE, PAIR, REST = 0.33e-9, 28 * 4 * 3584 / 0.6e12, 0.4  # joules of a byte read, of a query and key, of all else


@dataclass(frozen=True)
class Case:
    """Clients at a time, requests, words, pictures and their sides in patches, tokens of an answer."""

    clients: int
    requests: int
    words: int
    pictures: int
    side: int
    answer: int


CASES = {
    "1024x1024": Case(64, 256, 85, 1, 74, 128),
    "448x448": Case(128, 512, 85, 1, 32, 128),
    "text": Case(256, 1024, 531, 0, 0, 256),
    "4 x 1024x1024": Case(16, 64, 91, 4, 74, 128),
}


@dataclass(frozen=True)
class Limits:
    max_num_mixed_tokens: int
    max_model_len: int = 16384
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    encoder_budget_tokens: int = 8192
    embedding_bytes_per_token: int = 7168


def cost(batch: ScheduledBatch, kv_bytes_per_token: int) -> float:
    """Milliseconds of a step."""
    reads = sum(entry.end for entry in batch.seqs) * kv_bytes_per_token * KV_BYTE
    pairs = sum((entry.start + entry.end) / 2 * entry.num_tokens for entry in batch.seqs) * PAIR
    patches = [media.span.grid.num_patches for media in batch.encode]
    tower = TOWER * bool(patches) + PATCH * sum(patches) + PATCH_PAIR * sum(count**2 for count in patches)
    joules = float(np.interp(batch.num_tokens, ROWS, JOULES)) + tower + reads + pairs + REST
    return max(SHORTEST, joules / WATTS * 1000)


@dataclass
class Clients:
    """Those of a case; each asks again as soon as it has its answer."""

    spec: ModelSpec
    scheduler: Scheduler
    case: Case
    now: float = 0.0
    asked: dict[str, float] = field(default_factory=dict)
    said: dict[str, list[float]] = field(default_factory=dict)

    def ask(self) -> None:
        number, case = len(self.asked), self.case
        if number == case.requests:
            return
        length = case.side**2 // 4
        media = [
            MediaInput("image", i * length, length, 1, case.side, case.side, f"{number}.{i}".encode().ljust(16), 28, 28)
            for i in range(case.pictures)
        ]
        ids = [self.spec.ids.image_pad] * length * case.pictures
        ids += [(number * 7919 + i * 31) % 1000 for i in range(case.words)]
        rules = SamplingParams(max_tokens=case.answer, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, ignore_eos=True)
        request = AddRequest(str(number), ids, media, rules)
        self.scheduler.add(Sequence.create(request, self.spec, block_size=16, fallback_seed=0))
        self.asked[str(number)], self.said[str(number)] = self.now, []

    def hear(self, batch: ScheduledBatch) -> None:
        for output in self.scheduler.finish(batch, StepResult([1] * len(batch.sampling))):
            self.said[output.request_id].append(self.now)
            if output.finish_reason is not None:
                self.ask()


def simulate(spec: ModelSpec, name: str, bound: int) -> str:
    case = CASES[name]
    cache: EncoderCache[object] = EncoderCache(128 << 20)
    scheduler = Scheduler(Limits(bound), BlockManager(120_000, 16), cache)
    clients = Clients(spec, scheduler, case)
    for _ in range(case.clients):
        clients.ask()
    flight: tuple[ScheduledBatch, float] | None = None
    free = 0.0
    while scheduler.has_work or flight is not None:
        batch = scheduler.schedule()
        for media in batch.encode:
            cache.put(media.span.digest, media)
        before = flight
        if batch:
            free = max(clients.now, free) + cost(batch, spec.kv_bytes_per_token(2))
        flight = (batch, free) if batch else None
        if before is not None:
            clients.now = max(clients.now, before[1])
            clients.hear(before[0])
    first = sorted(times[0] - clients.asked[number] for number, times in clients.said.items())
    gaps = sorted(b - a for times in clients.said.values() for a, b in itertools.pairwise(times))
    rate = case.requests / clients.now * 1000
    between = f"{middle(gaps, 0.5):5.1f} / {middle(gaps, 0.99):5.1f}"
    return f"{name:14s} {bound:6} {rate:6.2f} req/s  TTFT p50 {middle(first, 0.5):6.0f} ms  between tokens {between} ms"


def middle(values: list[float], part: float) -> float:
    return values[int(part * (len(values) - 1))]


if __name__ == "__main__":
    shape = load_spec(sys.argv[1])
    for each in CASES:
        for most in [int(word) for word in sys.argv[2:]] or [8192, 2048, 1024, 768, 512]:
            print(simulate(shape, each, most), flush=True)
