"""Exact token counts of conversations, pictures included, without reading the same picture twice.

Knows three ways to count: a qvl server's `/tokenize`, the `usage` of any OpenAI-compatible server, and the tokenizer
and processor of this process. Does not know budgets or windows.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeAlias

from qvl.errors import RequestFailed, TooManyMedia
from qvl.media.load import load
from qvl.memory.media import media_key
from qvl.memory.steps import AskCall, AsyncAskCall, AsyncCountCall, Count, CountCall, Machine, Messages, adrive, drive
from qvl.prompt import Control, Segment, TextRun, Vision, build
from qvl.types import Completion, MediaPart, Message, PixelLimits, SamplingParams

if TYPE_CHECKING:
    from qvl.engine.config import EngineConfig
    from qvl.tokenizer import Tokenizer

MOST_REMEMBERED = 100_000  # pictures; a number each

_Key: TypeAlias = tuple[str, PixelLimits, str]


class TokenCounter(Protocol):
    """Counts as the model does.

    The answer is the number of tokens of the prompt that a chat request with these messages has, with the template, the
    pictures and the opening of the answer. Raises what such a request would raise (`PromptTooLong`, `BadMedia`, ...).
    """

    def __call__(self, messages: Messages, /) -> int: ...


class AsyncTokenCounter(Protocol):
    """`TokenCounter`, awaited."""

    async def __call__(self, messages: Messages, /) -> int: ...


class _PicturesOnce:
    """Counts with every picture and video replaced by a tiny one, plus what each real one takes beyond that.

    Exact, because a picture's pads stand between control tokens, so that nothing around them depends on their number.
    Each picture travels once, however often its conversation is counted. An address is taken to keep its picture.
    """

    def __init__(self) -> None:
        self._extra: dict[_Key, int] = {}

    def _counting(self, messages: Messages) -> Machine[int]:
        """The count of `messages`, from counts of smaller conversations."""
        extra = 0
        for message in messages:
            for part in message.parts:
                if isinstance(part, MediaPart):
                    extra += yield from self._measure(part)
        tokens: int = yield Count(tuple(map(_with_stand_ins, messages)))
        return tokens + extra

    def _measure(self, part: MediaPart) -> Machine[int]:
        key = (part.kind, part.limits, media_key(part.source))
        if key not in self._extra:
            real = yield Count((Message("user", (part,)),))
            tiny = yield Count((Message("user", (_stand_in(part),)),))
            if len(self._extra) >= MOST_REMEMBERED:
                self._extra.clear()
            self._extra[key] = real - tiny
        return self._extra[key]


def _with_stand_ins(message: Message) -> Message:
    parts = tuple(_stand_in(part) if isinstance(part, MediaPart) else part for part in message.parts)
    return replace(message, parts=parts)


def _stand_in(part: MediaPart) -> MediaPart:
    """A tiny picture, or a video of two, under the same bounds: never more tokens than the real one."""
    if part.kind == "image":
        return replace(part, source=_tiny_picture())
    return replace(part, source=(_tiny_picture(),) * 2, limits=replace(part.limits, fps=None, num_frames=None))


@cache
def _tiny_picture() -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (56, 56)).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


_ONE_TOKEN = SamplingParams(max_tokens=1)


class ServerCounter(_PicturesOnce):
    """Counts with a qvl server's `/tokenize`: `ServerCounter(client.tokens)`."""

    def __init__(self, tokens: CountCall) -> None:
        super().__init__()
        self._tokens = tokens

    def __call__(self, messages: Messages, /) -> int:
        return drive(self._counting(messages), self._tokens, _asks_nothing)


class AsyncServerCounter(_PicturesOnce):
    """`ServerCounter`, awaited."""

    def __init__(self, tokens: AsyncCountCall) -> None:
        super().__init__()
        self._tokens = tokens

    async def __call__(self, messages: Messages, /) -> int:
        return await adrive(self._counting(messages), self._tokens, _asks_nothing)


class UsageCounter(ServerCounter):
    """Counts with any OpenAI-compatible server: asks for one token and reads `usage.prompt_tokens`.

    Costs a prefill per count (prefix caches make it cheap). Servers without `/tokenize` for pictures need it.
    """

    def __init__(self, ask: AskCall) -> None:
        super().__init__(lambda messages: _prompt_tokens(ask(messages, _ONE_TOKEN)))


class AsyncUsageCounter(AsyncServerCounter):
    """`UsageCounter`, awaited."""

    def __init__(self, ask: AsyncAskCall) -> None:
        async def tokens(messages: Messages) -> int:
            return _prompt_tokens(await ask(messages, _ONE_TOKEN))

        super().__init__(tokens)


def _prompt_tokens(completion: Completion) -> int:
    if completion.usage.prompt_tokens < 1:
        raise RequestFailed("the server's answers carry no usage, so tokens cannot be counted with them")
    return completion.usage.prompt_tokens


def _asks_nothing(messages: Messages, sampling: SamplingParams) -> NoReturn:
    raise AssertionError("counting asks for counts only")


class LocalCounter:
    """Counts in this process, as the engine of `config` would: `LocalCounter(llm.engine.config, llm.tokenizer)`.

    Reads every picture once and remembers its size. Safe to use from several threads.
    """

    def __init__(self, config: EngineConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._seen: dict[_Key, Vision] = {}

    def __call__(self, messages: Messages, /) -> int:
        media = [part for message in messages for part in message.parts if isinstance(part, MediaPart)]
        for kind, number in Counter(part.kind for part in media).items():
            limit = self._config.limit_mm_per_prompt.get(kind, 0)
            if number > limit:
                raise TooManyMedia(kind, number, limit)
        waiting = iter(media)
        segments: list[Segment] = [
            piece if isinstance(piece, TextRun | Control) else self._vision(next(waiting))
            for piece in self._tokenizer.chat(messages)
        ]
        ids, merge_size = self._config.spec.ids, self._config.spec.vision.merge_size
        encode = self._tokenizer.encode
        prompt = build(segments, encode, image_pad=ids.image_pad, video_pad=ids.video_pad, merge_size=merge_size)
        return len(prompt.token_ids)

    def _vision(self, part: MediaPart) -> Vision:
        key = (part.kind, part.limits, media_key(part.source))
        if key not in self._seen:
            config = self._config
            one = load(part, config.spec.processor, config.policy, config.limits, resize_here=False)
            if len(self._seen) >= MOST_REMEMBERED:
                self._seen.clear()
            self._seen[key] = Vision(one.kind, one.grid, one.digest)
        return self._seen[key]
