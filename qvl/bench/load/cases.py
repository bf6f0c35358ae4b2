"""What load is put on a server: how many requests, how they arrive, what is in them. Plain data and the named cases.

The cases are the rows of the table in docs/performance.md.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from qvl.errors import ConfigError

# Each point of a sweep sends at least this many requests per stream: with fewer, most of it is start and end.
SWEEP_WAVES = 4
LONGEST_SIDE = 65_500  # of a JPEG, as libjpeg writes them


@dataclass(frozen=True, slots=True)
class Load:
    """One run: `concurrency` requests are always under way (closed loop), or `rate` requests a second arrive as a
    Poisson process, however long the server takes (open loop). Exactly one of the two is set.

    Every request has `input_tokens` of text (the chat template and pictures come on top) and `pictures` JPEGs of
    `width` x `height`, and wants exactly `output_tokens`. Texts are all different; pictures too, unless `same_picture`.
    """

    name: str = "custom"
    requests: int = 64
    concurrency: int | None = 8
    rate: float | None = None
    input_tokens: int = 64
    output_tokens: int = 128
    pictures: int = 1
    width: int = 1024
    height: int = 1024
    same_picture: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.rate is None):
            raise ConfigError("a load has either a concurrency or a request rate")
        if self.concurrency is not None and self.concurrency < 1:
            raise ConfigError(f"the concurrency must be at least 1, not {self.concurrency}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ConfigError(f"the request rate must be above 0, not {self.rate}")
        if min(self.requests, self.input_tokens, self.output_tokens, self.width, self.height) < 1 or self.pictures < 0:
            raise ConfigError("requests, tokens and the sides of pictures must be at least 1")
        if max(self.width, self.height) > LONGEST_SIDE:
            raise ConfigError(f"a JPEG of {self.width}x{self.height} cannot be: its sides are at most {LONGEST_SIDE:,}")

    @property
    def level(self) -> float:
        """The concurrency or the rate."""
        return self.rate if self.rate is not None else float(self.concurrency or 0)

    @property
    def label(self) -> str:
        """The level as a table shows it: "64" requests at once, "2.5/s" arrivals."""
        return f"{self.level:g}/s" if self.rate is not None else f"{self.concurrency}"

    @property
    def content(self) -> str:
        """What a request holds and wants, in a few words."""
        size = f"{self.pictures} x {self.width}x{self.height}"
        shown = f"{size}{', the same' * self.same_picture} + " if self.pictures else ""
        return f"{shown}{self.input_tokens} tokens in, {self.output_tokens} out"

    @property
    def key(self) -> str:
        """What the prompts are drawn from. Cases, levels and warm-ups differ in it: no cache of one helps another."""
        return f"{self.seed}/{self.name}/{self.label}"

    def arrivals(self) -> list[float]:
        """Seconds from the start to each request of an open loop: the first at 0, then a Poisson process."""
        assert self.rate is not None
        rng = random.Random(self.key)
        times = [0.0]
        while len(times) < self.requests:
            times.append(times[-1] + rng.expovariate(self.rate))
        return times


CASES = {
    load.name: load
    for load in (
        Load("text-latency", 4, 1, None, 128, 256, pictures=0),
        Load("image-latency", 12, 1, None, 32, 64),
        Load("image-throughput", 256, 64, None, 64, 128),
        Load("image-small-throughput", 512, 128, None, 64, 128, width=448, height=448),
        Load("text-throughput", 1024, 256, None, 512, 256, pictures=0),
        Load("same-image", 128, 32, None, 64, 64, same_picture=True),
        Load("multi-image", 64, 16, None, 64, 128, pictures=4),
    )
}


def sweep(load: Load, *, concurrencies: Sequence[int] = (), rates: Sequence[float] = ()) -> list[Load]:
    """The same load at each level. Raises `ConfigError` for one that comes twice: its prompts would, too."""
    if len({*concurrencies, *rates}) < len(concurrencies) + len(rates):
        raise ConfigError("a sweep takes every level once")
    return [
        dataclasses.replace(load, concurrency=level, rate=None, requests=max(load.requests, SWEEP_WAVES * level))
        for level in concurrencies
    ] + [dataclasses.replace(load, concurrency=None, rate=rate) for rate in rates]
