"""The engine: requests in, tokens out, one step at a time. Synchronous, single-threaded, one device.

With `async_scheduling` a call of `step` launches the next step before it waits for the one that was launched before:

    host    | plan 2, launch 2 | take in 1 | plan 3, launch 3 | take in 2 |
    device  |     step 1      |     step 2             |     step 3   ...

Knows how scheduler and runner are put together and what a request must look like to enter. Does not know sockets, text,
or who is asking.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Items

import msgspec
import numpy as np

from qvl.engine.block_manager import BlockManager
from qvl.engine.config import EngineConfig
from qvl.engine.device import device_name
from qvl.engine.grammar import Grammars
from qvl.engine.graphs import describe
from qvl.engine.pixels import Pixels, Room
from qvl.engine.protocol import AddRequest, EngineInfo, EngineStats, MediaInput, TokenOutput
from qvl.engine.runner import Flight, ModelRunner
from qvl.engine.scheduler import Scheduler
from qvl.engine.sequence import Sequence
from qvl.engine.start_clock import StartClock
from qvl.engine.transfer import SharedMemory
from qvl.errors import InvalidRequest
from qvl.specs import ModelSpec

WAIT_SECONDS = 0.001  # nothing else to do; but new requests must be heard


class Engine:
    """Serves the model of `config`. Raises `CheckpointError` or `ConfigError` when it cannot start.

    `grammars` may be shared with whoever prepares requests in this process. `clock` has run since the start began.
    """

    def __init__(self, config: EngineConfig, grammars: Grammars | None = None, clock: StartClock | None = None) -> None:
        clock = clock or StartClock()
        self.runner = ModelRunner(config, clock)
        self.config = self.runner.config
        assert self.config.num_blocks is not None
        blocks = BlockManager(self.config.num_blocks, self.config.block_size, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, blocks, self.runner.encoder_cache)
        self.info = engine_info(self.config, self.runner, clock.seconds)
        self.grammars = grammars or Grammars(config.spec, rehearsed=False)
        self._seeds = random.Random(self.config.seed)
        self._shared = SharedMemory(self.runner.device)
        self._flight: Flight | None = None  # launched, and not taken in yet

    def add(self, request: AddRequest, pixels: Items[Pixels | None] = ()) -> None:
        """Queue a request; `pixels` are uint8 [frames, h, w, 3], one per `request.media`.

        Raises `InvalidRequest` (`PromptTooLong` among it); the engine is as it was then.
        """
        check_request(request, pixels, self.config.spec)
        constraint = request.sampling.constraint
        seq = Sequence.create(
            request,
            self.config.spec,
            block_size=self.config.block_size,
            fallback_seed=self._seeds.getrandbits(63),
            pixels=list(pixels),
            grammar=None if constraint is None else self.grammars.start(constraint),
        )
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> bool:
        """End a request at once, its memory is free again; False when there is none. Nothing more is said about it."""
        return self.scheduler.abort(request_id)

    def share(self, room: Room) -> None:
        """Pixels will lie in this memory until `unshare`: the device should read it by itself if it can."""
        self._shared.add(room.memory)

    def unshare(self, room: Room) -> None:
        """Nobody has pixels in it any more."""
        self._shared.remove(room.memory)

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def step(self) -> list[TokenOutput]:
        """One forward pass: what every request that gained a token (or failed) has to say.

        With `async_scheduling` that is what the pass before found, and nothing the first time.
        """
        batch = self.scheduler.schedule()
        if not batch and self._flight is None and (awaited := self.scheduler.awaited) is not None:
            awaited.wait(WAIT_SECONDS)
        flight = self.runner.launch(batch) if batch else None
        outputs = self._take_in()
        if flight is not None:
            self.runner.sample(flight)
            self._flight = flight
            if not self.config.async_scheduling:
                outputs = self._take_in()
        return outputs

    def _take_in(self) -> list[TokenOutput]:
        """Wait for the step that was launched before, if there is one."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self.scheduler.finish(flight.batch, self.runner.collect(flight))

    def stats(self) -> EngineStats:
        """Gauges and counters for metrics."""
        return msgspec.structs.replace(self.scheduler.stats(), encode_seconds=self.runner.encoder.clock.seconds())

    def check_integrity(self) -> None:
        """Blocks, pictures and queues add up; when idle, everything has been given back."""
        self.scheduler.check_integrity()
        if not self.has_work:
            assert self.scheduler.blocks.num_used == 0, "an idle engine holds blocks"


def check_request(request: AddRequest, pixels: Items[Pixels | None], spec: ModelSpec) -> None:
    """Refuse what the runner could not compute. Raises `InvalidRequest`."""
    ids = np.asarray(request.token_ids, dtype=np.int64)
    if len(ids) and not (ids.min() >= 0 and ids.max() < spec.text.vocab_size):
        raise InvalidRequest(f"token ids must lie in [0, {spec.text.vocab_size})", param="prompt")
    if len(pixels) != len(request.media):
        raise InvalidRequest(
            f"{len(request.media)} pictures are announced, {len(pixels)} handed over", param="messages"
        )
    end = 0
    for media, array in zip(request.media, pixels, strict=True):
        _check_media(media, array, spec)
        if not end <= media.offset <= media.offset + media.length <= len(ids):
            raise InvalidRequest("pictures overlap or lie outside the prompt", param="messages")
        end = media.offset + media.length


def _check_media(media: MediaInput, pixels: Pixels | None, spec: ModelSpec) -> None:
    vision, grid = spec.vision, media.grid
    if pixels is None or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or not pixels.size:
        raise InvalidRequest("pixels must be uint8 [frames, height, width, 3]", param="messages")
    slices = -(-pixels.shape[0] // vision.temporal_patch_size)
    wanted = (slices, media.height // vision.patch_size, media.width // vision.patch_size)
    fits = media.height % vision.factor == 0 and media.width % vision.factor == 0
    if (grid.t, grid.h, grid.w) != wanted or not fits or media.length != grid.num_tokens(vision.merge_size):
        raise InvalidRequest("the size of a picture does not agree with its place in the prompt", param="messages")


def engine_info(config: EngineConfig, runner: ModelRunner, load_seconds: float) -> EngineInfo:
    """What is served and how."""
    parameters = runner.model.parameters()
    how = f"{runner.model.attention_reason}; products: {runner.model.linear_reason}"
    if runner.decodes is not None:
        how += f"; decodes: {describe(runner.decodes)}"
    if runner.prompts is not None:
        how += f"; steps of up to {runner.prompts.most} tokens: {describe(runner.prompts)}"
    return EngineInfo(
        model=config.served_name,
        device=device_name(runner.device),
        dtype=config.precision,
        attention=how,
        num_blocks=config.num_blocks or 0,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        load_seconds=load_seconds,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        kv_cache_bytes=(config.num_blocks or 0) * config.block_bytes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
