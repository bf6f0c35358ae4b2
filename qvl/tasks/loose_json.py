"""JSON as models write it: the grammar of JSON, and the slips that leave no doubt about what is meant.

    read_at("{'a': [1, 2,], b: True}", 0) == ({"a": [1, 2], "b": True}, 23)

Single and curly quotes, names without quotes, a comma too many, comments, Python's words for true, false and null, the
commas and colons of Chinese, line breaks within a text. What could mean two things (1,234; a text without quotes) is no
JSON. Knows nothing of schemas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_BLANK = re.compile(r"(?:\s+|//[^\n]*|#[^\n]*|/\*.*?\*/)*", re.S)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![\w.])")
_WORD = re.compile(r"[^\W\d]\w*")
_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
# An apostrophe in the middle of a word does not end a text in single quotes.
_TEXT = re.compile(
    r""" "((?:[^"\\]|\\.)*)" | '((?:[^'\\]|\\.|(?<=\w)'(?=\w))*)' | [“]([^”]*)” | [‘]([^’]*)’ """, re.S | re.X
)
_ESCAPE = re.compile(r"""\\(.)|["]""", re.S)
# What begins so is meant as JSON, not as a word in brackets.
_MEANT = re.compile(r"""[{\[]\s*(?:["'“‘{\[]|\w+\s*[:：])""")
_COMMAS, _COLONS = (",", "，"), (":", "：")
_MOST_DEPTH = 100
_MOST_STARTS = 20  # brackets that are looked behind


def values(answer: str) -> Iterator[tuple[Any, bool]]:
    """The outermost JSON values of an answer that may talk around them, and whether each is JSON to the letter.

    Raises `ValueError` where one begins and is broken: what stands within it is not what was meant.
    """
    decoder = json.JSONDecoder(parse_constant=_no_constant, strict=False)
    try:
        yield decoder.decode(answer.strip()), True
        return
    except (ValueError, RecursionError):
        pass
    end = 0
    for bracket in [match.start() for match in re.finditer(r"[{\[]", answer)][:_MOST_STARTS]:
        if bracket < end:
            continue
        try:
            value, end = decoder.raw_decode(answer, bracket)
            yield value, True
        except (ValueError, RecursionError):
            try:
                value, end = read_at(answer, bracket)
            except ValueError:
                if _MEANT.match(answer, bracket):
                    raise
                continue
            yield value, False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def read_at(text: str, start: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends. Raises `ValueError`."""
    reader = _Reader(text, start)
    return reader.value(0), reader.at


class _Reader:
    """A place in a text, moved on by every piece that is read."""

    def __init__(self, text: str, start: int) -> None:
        self._text = text
        self.at = start

    def value(self, depth: int) -> Any:
        if depth > _MOST_DEPTH:
            raise self._complaint("nested too deeply")
        mark = self._next()
        if mark == "{":
            return self._object(depth)
        if mark == "[":
            return self._list(depth)
        if piece := self._taken(_TEXT):
            return _unescaped(piece)
        if piece := self._taken(_NUMBER):
            return json.loads(piece[0])
        piece = self._taken(_WORD)
        if piece is None or piece[0] not in _WORDS:
            raise self._complaint("a value is missing")
        return _WORDS[piece[0]]

    def _object(self, depth: int) -> dict[str, Any]:
        self.at += 1
        found: dict[str, Any] = {}
        while self._next() != "}":
            text, word = self._taken(_TEXT), self._taken(_WORD)
            if (text is None) == (word is None):
                raise self._complaint("a name is missing")
            name = _unescaped(text) if text else word[0] if word else ""
            if self._next() not in _COLONS:
                raise self._complaint("a colon is missing")
            self.at += 1
            found[name] = self.value(depth + 1)
            self._comma("}")
        self.at += 1
        return found

    def _list(self, depth: int) -> list[Any]:
        self.at += 1
        found: list[Any] = []
        while self._next() != "]":
            found.append(self.value(depth + 1))
            self._comma("]")
        self.at += 1
        return found

    def _comma(self, closing: str) -> None:
        """Behind an item: a comma, or the end."""
        mark = self._next()
        if mark in _COMMAS:
            self.at += 1
        elif mark != closing:
            raise self._complaint("a comma is missing")

    def _next(self) -> str:
        """The character at the next place that is neither blank nor comment; empty at the end."""
        blank = _BLANK.match(self._text, self.at)
        self.at = blank.end() if blank else self.at
        return self._text[self.at : self.at + 1]

    def _taken(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        match = pattern.match(self._text, self.at)
        self.at = match.end() if match else self.at
        return match

    def _complaint(self, says: str) -> ValueError:
        return ValueError(f"{says} at character {self.at + 1}")


def _unescaped(piece: re.Match[str]) -> str:
    """What a text says. Raises `ValueError` for an escape that JSON does not know."""
    inside = next(group for group in piece.groups() if group is not None)
    as_json = _ESCAPE.sub(lambda match: "'" if match[1] == "'" else match[0] if match[1] else '\\"', inside)
    return str(json.loads(f'"{as_json}"', strict=False))
