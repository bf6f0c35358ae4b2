"""What a bound on prompts beside answers does, before a GPU is there: `python tools/simulate_steps.py FOLDER [BOUNDS]`.

The real scheduler, one step ahead, plans for many clients that ask again as soon as they are answered; a step takes as
long as arithmetic says of an H200 with the 7B. A model, not a measurement. FOLDER: from `qvl bench shape 7b FOLDER`.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from qvl.engine.batch import ScheduledBatch, StepResult
from qvl.engine.block_manager import BlockManager
from qvl.engine.encoder_cache import EncoderCache
from qvl.engine.protocol import AddRequest, MediaInput
from qvl.engine.scheduler import Scheduler
from qvl.engine.sequence import Sequence
from qvl.specs import ModelSpec, load_spec
from qvl.types import SamplingParams

# Milliseconds, read on one H200: 1,454 tokens through the matrices, a step that only reads them, one picture of 5,476
# patches through the tower; bytes of keys and values read in one; what else a step costs.
PREFILL, WEIGHTS, TOWER, KV_BYTES, REST = 27.9 / 1454, 3.9, 23.5 / 5476, 4.17e9, 0.4
ANSWER = 128


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
    reads = sum(entry.end for entry in batch.seqs) * kv_bytes_per_token / KV_BYTES
    tower = sum(media.span.grid.num_patches for media in batch.encode) * TOWER
    return max(WEIGHTS, batch.num_tokens * PREFILL) + reads + tower + REST


@dataclass
class Clients:
    """`count` of them; `total` requests of `text` tokens and one picture of 74 x 74 patches."""

    spec: ModelSpec
    scheduler: Scheduler
    total: int
    text: int
    now: float = 0.0
    asked: dict[str, float] = field(default_factory=dict)
    said: dict[str, list[float]] = field(default_factory=dict)

    def ask(self) -> None:
        number = len(self.asked)
        if number == self.total:
            return
        media = MediaInput("image", 0, 1369, 1, 74, 74, f"{number}".encode().ljust(16), 1036, 1036)
        ids = [self.spec.ids.image_pad] * 1369 + [(number * 7919 + i * 31) % 1000 for i in range(self.text)]
        rules = SamplingParams(max_tokens=ANSWER, temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, ignore_eos=True)
        request = AddRequest(str(number), ids, [media], rules)
        self.scheduler.add(Sequence.create(request, self.spec, block_size=16, fallback_seed=0))
        self.asked[str(number)], self.said[str(number)] = self.now, []

    def hear(self, batch: ScheduledBatch) -> None:
        for output in self.scheduler.finish(batch, StepResult([1] * len(batch.sampling))):
            self.said[output.request_id].append(self.now)
            if output.finish_reason is not None:
                self.ask()


def simulate(spec: ModelSpec, bound: int, count: int = 64, total: int = 192, text: int = 85) -> str:
    cache: EncoderCache[object] = EncoderCache(128 << 20)
    scheduler = Scheduler(Limits(bound), BlockManager(120_000, 16), cache)
    clients = Clients(spec, scheduler, total, text)
    for _ in range(count):
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
    first = sorted(times[0] - clients.asked[name] for name, times in clients.said.items())
    gaps = sorted(b - a for times in clients.said.values() for a, b in itertools.pairwise(times))
    rate = total / clients.now * 1000
    between = f"{middle(gaps, 0.5):5.1f} / {middle(gaps, 0.99):5.1f}"
    return f"{bound:6} {rate:6.2f} req/s  TTFT p50 {middle(first, 0.5):6.0f} ms  between tokens p50 / p99 {between} ms"


def middle(values: list[float], part: float) -> float:
    return values[int(part * (len(values) - 1))]


if __name__ == "__main__":
    shape = load_spec(sys.argv[1])
    for each in [int(word) for word in sys.argv[2:]] or [8192, 2048, 1024, 768, 512]:
        print(simulate(shape, each), flush=True)
