"""The request that folds older turns into one running summary, and how the summary goes back into a conversation.

Knows words (English and Chinese) and the shape of a transcript. Does not know tokens, budgets or who answers. A summary
is made of what users wrote, so it goes into a user's turn, never into a system message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qvl.types import Completion, MediaPart, Message, Part, SamplingParams, TextPart

WRAPPING_TOKENS = 32  # what the frame around a summary may take, generously
_CUT = " […] "


class SummaryFailed(Exception):
    """The model's summary cannot be used; the text says why. Never leaves `qvl.memory`."""


@dataclass(frozen=True, slots=True)
class Running:
    """The running summary: stands for all turns with an index below `covers`; `tokens` is its cost in a prompt."""

    text: str
    covers: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Words:
    """One language of the request and of the frame."""

    instructions: str
    previous: str
    new: str
    ask: str
    opening: str
    closing: str
    picture: str
    video: str
    unseen: str
    roles: Mapping[str, str]


_ENGLISH = _Words(
    instructions=(
        "You keep the running summary of a conversation between a user and an assistant. Write one summary that merges "
        "the summary so far with the turns that follow it, in the language of the conversation, as plain text of at "
        "most {words} words. Keep names, numbers, decisions, open questions and what the user wants. Describe every "
        "picture and video in one sentence, with its number. Do not answer the user, do not add anything new."
    ),
    previous="Summary so far:\n",
    new="Turns to merge:\n",
    ask="\nWrite the merged summary now.",
    opening="[Summary of the conversation so far]\n",
    closing="\n[End of the summary]\n\n",
    picture="[Picture {}]",
    video="[Video {}]",
    unseen="[{}, not shown here]",
    roles={"user": "User: ", "assistant": "Assistant: ", "tool": "Tool result: "},
)
_CHINESE = _Words(
    instructions=(
        "你负责维护用户与助手之间对话的摘要。请把已有摘要与随后的对话合并成一份新的摘要，使用中文纯文本，不超过{words}个字。"
        "保留人名、数字、结论、未解决的问题和用户的要求。每张图片和每段视频用一句话描述，并写明编号。不要回答用户的问题，不要添加新内容。"
    ),
    previous="已有摘要：\n",
    new="需要合并的对话：\n",
    ask="\n请写出合并后的摘要。",
    opening="【此前对话的摘要】\n",
    closing="\n【摘要结束】\n\n",
    picture="【图片{}】",
    video="【视频{}】",
    unseen="【{}，此处未附】",
    roles={"user": "用户：", "assistant": "助手：", "tool": "工具结果："},
)
_IDEOGRAPH = re.compile(r"[\u3400-\u9fff\U00020000-\U0003ffff]")
_KANA = re.compile(r"[\u3040-\u30ff]")


def summary_messages(
    messages: Sequence[Message],
    fold: Sequence[int],
    previous: str,
    max_tokens: int,
    *,
    with_media: bool = True,
    max_chars: int | None = None,
) -> tuple[Message, ...]:
    """The conversation that asks for a summary of the turns `fold` (indices into `messages`) and of `previous`.

    Pictures are shown to the model unless `with_media` is off; they keep their number in the whole conversation. Texts
    above `max_chars` characters lose their middle. `max_tokens` is what the summary may take, told as a word count.
    """
    words = _language([*(messages[index] for index in fold), Message("user", (TextPart(previous),))])
    share = 1.0 if words is _CHINESE else 0.6  # of a word per token, with some air: an over-long summary is lost work
    told = words.instructions.format(words=max(20, int(max_tokens * share * 0.7)))
    parts: list[Part] = [TextPart(f"{words.previous}{previous}\n\n")] if previous else []
    parts.append(TextPart(words.new))
    numbers = _media_numbers(messages)
    for index in fold:
        parts.append(TextPart(words.roles.get(messages[index].role, words.roles["user"])))
        parts += _transcript(messages[index], words, numbers[index], with_media, max_chars)
        parts.append(TextPart("\n"))
    parts.append(TextPart(words.ask))
    return Message("system", (TextPart(told),)), Message("user", tuple(_joined(parts)))


def summary_sampling(max_tokens: int) -> SamplingParams:
    """Short and without chance."""
    return SamplingParams(max_tokens=max(1, max_tokens - WRAPPING_TOKENS), temperature=0.0)


def read_summary(completion: Completion) -> str:
    """The summary's text. Raises `SummaryFailed` for one that is empty, broken off or cut at its length."""
    text, reason = completion.text.strip(), completion.answers[0].finish_reason
    if reason == "length":
        raise SummaryFailed("the summary was over-long")
    if reason != "stop":
        raise SummaryFailed(f"the summary ended with '{reason}'")
    if not text:
        raise SummaryFailed("the summary was empty")
    return text


def with_summary(message: Message, summary: str) -> Message:
    """`message` with the summary before its own words: turns still alternate, system messages stay as they are."""
    return replace(message, parts=tuple(_joined([TextPart(_framed(summary)), *message.parts])))


def _framed(summary: str) -> str:
    words = _language([Message("user", (TextPart(summary),))])
    return f"{words.opening}{summary}{words.closing}"


def _language(messages: Sequence[Message]) -> _Words:
    """Chinese where at least a fifth of the characters are ideographs and no Japanese kana stand between them."""
    text = "".join(part.text for message in messages for part in message.parts if isinstance(part, TextPart))
    ideographs, letters = len(_IDEOGRAPH.findall(text)), len("".join(text.split()))
    return _CHINESE if ideographs * 5 >= letters > 0 and not _KANA.search(text) else _ENGLISH


def _media_numbers(messages: Sequence[Message]) -> list[dict[str, int]]:
    """For each message how many pictures and videos came before it."""
    seen = {"image": 0, "video": 0}
    before = []
    for message in messages:
        before.append(dict(seen))
        for part in message.parts:
            if isinstance(part, MediaPart):
                seen[part.kind] += 1
    return before


def _transcript(
    message: Message, words: _Words, before: Mapping[str, int], with_media: bool, max_chars: int | None
) -> Iterator[Part]:
    seen = dict(before)
    for part in message.parts:
        if isinstance(part, TextPart):
            yield TextPart(_cut(part.text, max_chars))
            continue
        seen[part.kind] += 1
        name = (words.picture if part.kind == "image" else words.video).format(seen[part.kind])
        if with_media:
            yield TextPart(f"{name} ")
            yield part
        else:
            yield TextPart(words.unseen.format(name.strip("[]【】")))
        yield TextPart(" ")


def _cut(text: str, max_chars: int | None) -> str:
    if max_chars is None or len(text) <= max_chars:
        return text
    return f"{text[: max_chars * 2 // 3]}{_CUT}{text[len(text) - max_chars // 3 :]}"


def _joined(parts: Sequence[Part]) -> Iterator[Part]:
    """Neighbouring texts as one."""
    text = ""
    for part in parts:
        if isinstance(part, TextPart):
            text += part.text
            continue
        if text:
            yield TextPart(text)
        text = ""
        yield part
    if text:
        yield TextPart(text)
