"""From messages to what the engine takes: prompt, pixels, resolved sampling. For `LLM` and, in threads, for backends.

Knows the checkpoint's template, the limits of this engine, and how to say why a request does not fit. Does not know the
engine itself, sockets or HTTP. Blocks on network and disk while media are read; safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from qvl.engine.config import EngineConfig
from qvl.engine.loading import Loading
from qvl.engine.protocol import AddRequest, MediaInput, PixelFile
from qvl.errors import InvalidRequest, PromptTooLong, TooManyMedia
from qvl.media.image import Empty
from qvl.media.kept import Kept
from qvl.media.load import LoadedMedia, keep_pictures, load
from qvl.media.sizes import frame_size, picture_size
from qvl.prompt import Control, Prompt, Segment, TextRun, Vision, build
from qvl.specs import ProcessorSpec
from qvl.tokenizer import MediaSlot, Tokenizer
from qvl.types import ChatRequest, CompletionRequest, Constraint, MediaPart, Message, PixelLimits, SamplingParams

MOST_LISTED = 16
COUNTED_LENGTHS = 8  # a prompt that is too long is counted exactly up to this many times the context
MOST_CHARS_A_TOKEN = 64  # on average over a prompt; ordinary text has 3 or 4
_NAMES = {"image": "picture", "video": "video"}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for the engine: `media[i]` fills `prompt.spans[i]`, `sampling` is resolved."""

    prompt: Prompt
    media: tuple[LoadedMedia, ...]
    sampling: SamplingParams
    salt: bytes

    def request(self, request_id: str, index: int = 0, files: Sequence[PixelFile | None] | None = None) -> AddRequest:
        """The engine's message for answer `index` of `n`; `files` name the pixels, None where they go in process."""
        media = [
            MediaInput(
                kind=span.kind,
                offset=span.offset,
                length=span.length,
                t=span.grid.t,
                h=span.grid.h,
                w=span.grid.w,
                digest=span.digest,
                height=loaded.height,
                width=loaded.width,
                pixels=files[number] if files is not None else None,
            )
            for number, (span, loaded) in enumerate(zip(self.prompt.spans, self.media, strict=True))
        ]
        return AddRequest(
            request_id, list(self.prompt.token_ids), media, answer_sampling(self.sampling, index), self.salt
        )


def answer_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """Sampling of answer `index` of one request: seed + index, so that seeded answers differ and can be repeated."""
    if index == 0 or sampling.seed is None:
        return sampling
    seed = (sampling.seed + index + 2**63) % 2**64 - 2**63
    return dataclasses.replace(sampling, seed=seed)


class Intake:
    """Prepares requests for an engine of this config.

    `check` refuses a constraint that no answer could keep to, by `InvalidRequest`; None where the caller has done so.
    `kept`: pictures of earlier requests, for this config and policy; by default those of this intake. `empty`: where
    pictures are decoded to.
    """

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        check: Callable[[Constraint], None] | None = None,
        loading: Loading | None = None,
        kept: Kept[LoadedMedia] | None = None,
        empty: Empty | None = None,
    ) -> None:
        self._check = check
        self._loading = loading or Loading()
        self._kept = kept or keep_pictures()
        self._empty = empty
        self.config = config
        self.tokenizer = tokenizer
        self.spec = config.spec

    def prepare_chat(self, request: ChatRequest, *, later: bool = False) -> Prepared:
        """Load every picture and video in order, render, lay out the prompt. With `later` call `finish` afterwards.

        Raises `TooManyMedia` before anything is fetched; `BadMedia`, `MediaRefused` and the like, saying which one;
        `PromptTooLong`; `InvalidRequest` for what template or sampling cannot take.
        """
        parts = _media_parts(request.messages)
        self._check_counts(parts)
        self._check_constraint(request.sampling)
        media = self._load(parts, request.limits.over(self.config.limits), later)
        pieces = self.tokenizer.chat(  # while pictures may still be decoded
            request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_vision_id=request.add_vision_id,
        )
        waiting = iter(media)
        segments: list[Segment] = [
            _vision(next(waiting)) if isinstance(piece, MediaSlot) else piece for piece in pieces
        ]
        return self._prepared(self._build(segments), media, request.sampling, request.cache_salt, "messages")

    def prepare_completion(self, request: CompletionRequest) -> Prepared:
        """A plain prompt; control tokens spelt out in a text are text, ids are taken as they are.

        Raises `PromptTooLong`, `InvalidRequest`.
        """
        self._check_constraint(request.sampling)
        if isinstance(request.prompt, str):
            prompt = self._build([TextRun(request.prompt)])
        else:
            self._check_ids("prompt", request.prompt)
            prompt = Prompt(list(request.prompt), ())
        if not prompt.token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        return self._prepared(prompt, (), request.sampling, request.cache_salt, "prompt")

    def prepare_raw(
        self, token_ids: Sequence[int], parts: Sequence[MediaPart], sampling: SamplingParams, limits: PixelLimits
    ) -> Prepared:
        """A prompt of trusted ids in which one pad stands for each of `parts`, in order within each kind.

        Raises as `prepare_chat` does, and `InvalidRequest` when pads and parts do not agree.
        """
        self._check_ids("prompt", token_ids)
        self._check_counts(parts)
        self._check_constraint(sampling)
        pads = {self.spec.ids.image_pad: "image", self.spec.ids.video_pad: "video"}
        if Counter(pads[token_id] for token_id in token_ids if token_id in pads) != Counter(p.kind for p in parts):
            raise InvalidRequest("the prompt must hold one pad token for every picture and video", param="prompt")
        if not token_ids:
            raise InvalidRequest("the prompt is empty", param="prompt")
        loaded = self._load(parts, limits.over(self.config.limits))
        waiting = {kind: iter([one for one in loaded if one.kind == kind]) for kind in pads.values()}
        pieces = [next(waiting[pads[token_id]]) if token_id in pads else Control(token_id) for token_id in token_ids]
        media = tuple(piece for piece in pieces if isinstance(piece, LoadedMedia))
        prompt = self._build(_vision(piece) if isinstance(piece, LoadedMedia) else piece for piece in pieces)
        return self._prepared(prompt, media, sampling, "", "prompt")

    def _build(self, segments: Iterable[Segment]) -> Prompt:
        ids, merge_size = self.spec.ids, self.spec.vision.merge_size
        encode = _BoundedEncoder(self.tokenizer, self.config.max_model_len)
        return build(segments, encode, image_pad=ids.image_pad, video_pad=ids.video_pad, merge_size=merge_size)

    def _check_constraint(self, sampling: SamplingParams) -> None:
        if sampling.constraint is not None and self._check is not None:
            self._check(sampling.constraint)

    def _check_counts(self, parts: Sequence[MediaPart]) -> None:
        for kind, count in Counter(part.kind for part in parts).items():
            limit = self.config.limit_mm_per_prompt.get(kind, 0)
            if count > limit:
                raise TooManyMedia(kind, count, limit)

    def finish(self, media: Sequence[LoadedMedia], come: Callable[[int], None]) -> None:
        """Wait for what was left for later. Raises `BadMedia`.

        `come` hears whose pixels are there, at once and in any thread, and once more when their turn has come here.
        """
        for number, one in enumerate(media):
            if one.decoding is not None:
                one.decoding.when_over(partial(come, number))
        for number, (name, one) in enumerate(zip(_names(media), media, strict=True)):
            if one.decoding is not None:
                with _said_of(name):
                    one.decoding.finish(self._loading.gate)
            come(number)

    def _load(self, parts: Sequence[MediaPart], limits: PixelLimits, later: bool = False) -> tuple[LoadedMedia, ...]:
        """Pictures have their final size on a CPU engine; a GPU resizes them itself."""
        resize_here = self.config.device == "cpu"
        processor, policy, gate, kept = self.spec.processor, self.config.policy, self._loading.gate, self._kept
        empty = self._empty

        def load_one(named: tuple[str, MediaPart]) -> LoadedMedia:
            name, part = named
            with _said_of(name):
                loaded = load(
                    part, processor, policy, limits,
                    resize_here=resize_here, gate=gate, kept=kept, empty=empty, later=later,
                )  # fmt: skip
            if later and loaded.decoding is not None:
                loaded.decoding.begin(gate, self._loading.begin)
            return loaded

        return tuple(self._loading.in_order(load_one, list(zip(_names(parts), parts, strict=True))))

    def _prepared(
        self, prompt: Prompt, media: tuple[LoadedMedia, ...], sampling: SamplingParams, salt: str, param: str
    ) -> Prepared:
        room = self.config.max_model_len - len(prompt.token_ids)
        if room < 1:
            error = PromptTooLong(len(prompt.token_ids), self.config.max_model_len, self._hint(prompt, media))
            error.param = param
            raise error
        return Prepared(prompt, media, self._resolve(sampling, room), salt.encode())

    def _resolve(self, sampling: SamplingParams, room: int) -> SamplingParams:
        """Every open value filled. `max_tokens` defaults to the room that the prompt leaves, and is clipped to it.

        A large one is a wish for "as much as possible": the answer then ends with "length" where the context does.
        """
        self._check_ids("logit_bias", sampling.logit_bias)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        if sampling.min_tokens > room:
            raise InvalidRequest(
                f"'min_tokens' is {sampling.min_tokens}, but the prompt leaves room for {room} tokens",
                param="min_tokens",
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            sampling = dataclasses.replace(sampling, max_tokens=room)
        return self.spec.generation.fill(sampling, room)

    def _check_ids(self, param: str, ids: Iterable[int]) -> None:
        size = self.spec.text.vocab_size
        for token_id in ids:
            if not 0 <= token_id < size:
                raise InvalidRequest(f"'{param}' has the token id {token_id}; ids go from 0 to {size - 1}", param=param)

    def _hint(self, prompt: Prompt, media: Sequence[LoadedMedia]) -> str:
        """What each picture takes, and which `max_pixels` would make all of them fit."""
        if not media:
            return "Shorten it"
        text = len(prompt.token_ids) - sum(one.num_tokens for one in media)
        listed = [f"{name} {one.num_tokens}" for name, one in zip(_names(media), media, strict=True)][:MOST_LISTED]
        more = f", {len(media) - len(listed)} more" if len(media) > len(listed) else ""
        says = f"Tokens: {', '.join(listed)}{more}, text {text}"
        pixels = fitting_max_pixels(media, self.config.max_model_len - 1 - text, self.spec.processor)
        if pixels is None:
            return f"{says}. They do not fit at any size: send fewer pictures or less text"
        return f"{says}. With max_pixels {pixels} all of it would fit"


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """What is wrong inside is said of the medium of this name."""
    try:
        yield
    except InvalidRequest as error:
        error.about(name)
        error.param = error.param or "messages"
        raise


class _BoundedEncoder:
    """Encodes the texts of one prompt, until they are certain to be far too long for `limit` tokens.

    Counting them exactly would take hundreds of bytes for each byte of a request. Raises `PromptTooLong`.
    """

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._tokens_left, self._chars_left = COUNTED_LENGTHS * limit, MOST_CHARS_A_TOKEN * limit

    def __call__(self, text: str) -> list[int]:
        self._chars_left -= len(text)
        if self._chars_left < 0 or self._tokenizer.is_longer_than(text, self._tokens_left):
            raise self._too_long()
        ids = self._tokenizer.encode(text)
        self._tokens_left -= len(ids)
        if self._tokens_left < 0:
            raise self._too_long()
        return ids

    def _too_long(self) -> PromptTooLong:
        return PromptTooLong(self._limit, self._limit, "Shorten it", is_counted=False)


def fitting_max_pixels(media: Sequence[LoadedMedia], room: int, spec: ProcessorSpec) -> int | None:
    """The largest `max_pixels`, as a multiple of one token's area, with which `media` take at most `room` tokens.

    None when not even the smallest does. Counts grow with `max_pixels`, so that the answer is found by halving.
    """
    area = spec.factor**2
    low, high = 0, max(one.height * one.width for one in media) // area
    while low < high:
        middle = (low + high + 1) // 2
        if _tokens_at(media, middle * area, spec) <= room:
            low = middle
        else:
            high = middle - 1
    return low * area or None


def _tokens_at(media: Sequence[LoadedMedia], max_pixels: int, spec: ProcessorSpec) -> int:
    """Tokens of all `media` under `max_pixels`."""
    limits = PixelLimits(max_pixels=max_pixels)
    total = 0
    for one in media:
        if one.kind == "video":
            height, width = frame_size(len(one.pixels), *one.original_size, spec, limits)
        else:
            height, width = picture_size(*one.original_size, spec, limits)
        total += one.grid.t * (height // spec.factor) * (width // spec.factor)
    return total


def _media_parts(messages: Sequence[Message]) -> list[MediaPart]:
    return [part for message in messages for part in message.parts if isinstance(part, MediaPart)]


def _names(media: Sequence[MediaPart] | Sequence[LoadedMedia]) -> list[str]:
    """ "picture 1", "video 1", "picture 2": counted by kind, as the caller would."""
    seen: Counter[str] = Counter()
    names = []
    for one in media:
        seen[one.kind] += 1
        names.append(f"{_NAMES[one.kind]} {seen[one.kind]}")
    return names


def _vision(one: LoadedMedia) -> Vision:
    return Vision(one.kind, one.grid, one.digest)
