"""What models put around an answer, and how it comes off: code fences, an introduction, an offer of more help.

    bare('Sure! Here is the translation:\\n\\n"Open"\\n\\nLet me know if you need more.') == "Open"

What was asked for may itself begin with a line that ends in a colon: an introduction is one that is made of the words
of introductions and of no others. Does not know tasks.
"""

from __future__ import annotations

import re

from qvl.tasks.language import NAMES

_OPENING = re.compile(r"\s*(?:```|~~~)[^\n]*")
_FENCE = re.compile(r"\s*(`{3,}(?!`)|~{3,}(?!~))[^\n]*\n")
_INNER = re.compile(r"^[ \t]*(`{3,}(?!`)|~{3,}(?!~))[^\n]*\n(.*?)\n?^[ \t]*\1[`~]*[ \t]*$", re.S | re.M)

_SURE = re.compile(
    r"(?:sure(?: thing)?|certainly|of course|absolutely|ok(?:ay)?|好的|当然(?:可以)?|没问题)"
    r"(?:[!.,，！。]\s*|(?=\s*[:：]))",
    re.I,
)
_PHRASE = re.compile(r"[*_]*([^\n:：]{1,160}?)[*_]*\s*[:：][*_]*\s*")
_THE = frozenset("the this your provided given".split())
_PICTURE = frozenset("image picture photo photograph screenshot".split())
_TEXT = frozenset("text words content contents line lines transcription".split())
_TRANSLATION = frozenset("translation translated translates".split())
_ANNOUNCING = frozenset("here here's below following follows is to into reads".split())
_WORDS = (
    (_THE | _PICTURE | _TEXT | _TRANSLATION | _ANNOUNCING)
    | {word.lower() for name in NAMES.values() for word in name.split()}
    | frozenset(
        "a an are as asked attached be by can complete document extracted for found from full in it its of on original "
        "page requested says shown sign simplified that transcribed visible what with within would written you "
        "you've".split()
    )
)
_SURELY = frozenset("sure! certainly! course! absolutely! okay!".split())  # as one is written, to its end
_CHARACTERS = (
    "以下|下面|这|是|为|您|你|图片|图像|图|中|里|上|的|所有|全部|文字|文本|内容|信息|翻译|译文|识别|提取|成|出|后|到|结果"
    "|如下|中文|英文|汉语|英语|完整|[，, ]"
)
_CHINESE = re.compile(f"(?:{_CHARACTERS})+")
_GROWING_CHINESE = re.compile(f"(?:{_CHARACTERS}|好的|当然|可以|没问题)*[\u4e00-\u9fff]?")
_ANNOUNCES_CHINESE = re.compile(
    "图(?:片|像)?[中里上的].*(?:文字|文本|内容|翻译|译文)|(?:以下|下面).*(?:翻译|译文)|(?:翻译|译文).*如下"
)
_OFFER = re.compile(
    "let me know|feel free to|hope (?:this|that|it) helps|告诉我|告知我|随时问我|希望.*帮助", re.I
)  # somewhere in the last paragraph
_QUOTES = {'"': '"', "“": "”", "「": "」"}


def unfenced(answer: str) -> str:
    """The answer without a code fence that stands around all of it; an end that was cut off is not missed."""
    fence = _FENCE.match(answer)
    if fence is None:
        return answer
    inside = answer[fence.end() :]
    closed = inside.rstrip()
    if fence[1] in closed[len(closed.rstrip("`~")) :]:
        inside = closed.rstrip("`~").rstrip(" \t").removesuffix("\n")
    return answer if re.search(rf"^[ \t]*{fence[1]}", inside, re.M) else inside


def fenced(answer: str) -> str:
    """What stands in the first code fence of an answer that also talks, else all of it."""
    match = _INNER.search(answer)
    return match[2] if match else unfenced(answer)


def fences(answer: str) -> list[str]:
    """What stands in each code fence of an answer."""
    return [match[2] for match in _INNER.finditer(answer)]


def bare(answer: str, *labels: str) -> str:
    """The answer alone: without a fence around it; without an introduction, and the quotes and the offer that come with
    one. `labels` are words that introduce it too, such as "translation"."""
    start = _introduction(answer, labels)
    if not start and not _OPENING.match(answer):
        return answer
    before, last = _last_paragraph(answer[start:])
    text = unfenced(before if _OFFER.search(last) else answer[start:])
    return _unquoted(text) if start else text


def certain(answer: str) -> str:
    """What stays of an answer that is still coming: no blank or fence at its end, nor a fence that it begins with."""
    return "" if _OPENING.fullmatch(answer) else answer.rstrip().rstrip("`~").rstrip()


def grown(answer: str, *labels: str) -> str:
    """What `bare` will begin with, by an answer that is still coming."""
    answer = certain(answer)
    if _may_introduce(answer, labels):
        return ""
    start = _introduction(answer, labels)
    if not start and not _OPENING.match(answer):
        return answer
    whole, _ = _last_paragraph(answer[start:])  # which may become an offer
    return "" if start and whole[:1] in _QUOTES else certain(unfenced(whole))


def _introduction(answer: str, labels: tuple[str, ...]) -> int:
    """Where the answer begins behind its introduction; 0 where there is none, or nothing else."""
    begin = len(answer) - len(answer.lstrip())
    sure = _SURE.match(answer, begin)
    start = sure.end() if sure else begin
    phrase = _PHRASE.match(answer, start)
    if phrase and _introduces(phrase[1], sure is not None, labels):
        start = phrase.end()
    elif not sure or "\n" not in sure[0]:
        return 0
    return start if start < len(answer) else 0


def _introduces(phrase: str, sure: bool, labels: tuple[str, ...]) -> bool:
    """Whether it is made of the words of introductions and says which: of a picture's text, or a translation."""
    if phrase.strip().lower() in labels:
        return True
    words = frozenset(_plain(phrase))
    if words <= _WORDS:
        told = (_THE & words and _PICTURE & words and _TEXT & words) or (_TRANSLATION & words and _ANNOUNCING & words)
        return sure or bool(told)
    return _CHINESE.fullmatch(phrase) is not None and (sure or _ANNOUNCES_CHINESE.search(phrase) is not None)


def _may_introduce(answer: str, labels: tuple[str, ...]) -> bool:
    """Whether an answer that is still coming may yet turn out to be an introduction."""
    answer = answer.lstrip()
    sure = _SURE.match(answer)
    rest = answer[sure.end() :] if sure else answer
    phrase = _PHRASE.fullmatch(rest)
    if phrase:
        return _introduces(phrase[1], sure is not None, labels)
    if re.search(r"[:：\n]", rest.strip()):
        return False
    known = _WORDS | _SURELY | frozenset(labels)
    *words, last = _plain(rest) or [""]
    return (known.issuperset(words) and any(word.startswith(last) for word in known)) or (
        _GROWING_CHINESE.fullmatch(rest) is not None
    )


def _plain(phrase: str) -> list[str]:
    return phrase.lower().replace("’", "'").strip("*_ ").replace(",", "").split()


def _last_paragraph(text: str) -> tuple[str, str]:
    """The text before its last paragraph, and that one where it is a single line; all of it and nothing elsewhere."""
    before, _, last = text.rstrip().rpartition("\n")
    is_apart = before.rpartition("\n")[2].strip() == "" and before.strip() != ""
    return (before.rstrip(), last) if is_apart else (text, "")


def _unquoted(text: str) -> str:
    """Without the quotes around all of it."""
    inner = text.strip()
    end = _QUOTES.get(inner[:1])
    if end is None or len(inner) < 2 or inner[-1] != end or any(mark in inner[1:-1] for mark in (inner[0], end)):
        return text
    return inner[1:-1]
