"""How much work it is to read an answer, as a number that is the same on every machine.

Work is lines of Python that run in the package and in the parser of HTML, and steps of regular expressions. These are
matched by C code that tells nobody how often it went back; so each is matched a second time by the small matcher here,
which goes the same ways and counts. That both find the same is checked every time.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any, TypeAlias

import pytest

# Moved in Python 3.11.
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
compiler: Any = importlib.import_module("re._compiler" if sys.version_info >= (3, 11) else "sre_compile")

Node: TypeAlias = tuple[Any, Any]  # an operation of an expression and what it is about, as `re` parses it
Then: TypeAlias = Callable[[int], "int | None"]  # the rest of an expression, from a place on: where it ends, or None
DEEP = 50_000  # frames: a repeated group takes a few for each time


class Work:
    """Counts while `counting` runs."""

    def __init__(self) -> None:
        self.steps = 0
        self.lines = 0

    @property
    def total(self) -> int:
        return self.steps + self.lines

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if "/qvl/" not in file and not file.endswith(("html/parser.py", "_markupbase.py")):
            return None
        self.lines += event == "line"
        return self.trace


@contextmanager
def counting(patch: pytest.MonkeyPatch) -> Iterator[Work]:
    """What runs inside is counted."""
    work = Work()
    with patch.context() as inside:
        for name, module in tuple(sys.modules.items()):
            if name.startswith("qvl.tasks") or name in ("html.parser", "_markupbase"):
                _replace(module, work, inside)
        limit, before = sys.getrecursionlimit(), sys.gettrace()
        sys.setrecursionlimit(DEEP)
        sys.settrace(work.trace)
        try:
            yield work
        finally:
            sys.settrace(before)
            sys.setrecursionlimit(limit)


def _replace(module: ModuleType, work: Work, patch: pytest.MonkeyPatch) -> None:
    """Its expressions, and its way to others, by such as count."""
    for name, value in tuple(vars(module).items()):
        if isinstance(value, re.Pattern):
            patch.setattr(module, name, Counted(value, work))
        elif isinstance(value, tuple) and value and all(isinstance(one, re.Pattern) for one in value):
            patch.setattr(module, name, tuple(Counted(one, work) for one in value))
        elif value is re:
            patch.setattr(module, name, CountedModule(work))


class Counted:
    """A compiled expression that counts."""

    def __init__(self, pattern: re.Pattern[str], work: Work) -> None:
        self._pattern, self._work = pattern, work

    def match(self, text: str, *within: int) -> re.Match[str] | None:
        return self._one(self._pattern.match(text, *within), text, within, "match")

    def fullmatch(self, text: str, *within: int) -> re.Match[str] | None:
        return self._one(self._pattern.fullmatch(text, *within), text, within, "fullmatch")

    def search(self, text: str, *within: int) -> re.Match[str] | None:
        return self._one(self._pattern.search(text, *within), text, within, "search")

    def finditer(self, text: str, *within: int) -> Iterator[re.Match[str]]:
        return iter(self._all(text, within))

    def findall(self, text: str) -> list[Any]:
        self._all(text, ())
        return self._pattern.findall(text)

    def split(self, text: str, *most: int) -> list[Any]:
        self._all(text, ())
        return self._pattern.split(text, *most)

    def sub(self, instead: Any, text: str, *most: int) -> str:
        self._all(text, ())
        return self._pattern.sub(instead, text, *most)

    def _one(self, found: re.Match[str] | None, text: str, within: tuple[int, ...], how: str) -> re.Match[str] | None:
        start, end = (*within, len(text))[:2] if within else (0, len(text))
        self._count(found, text[:end], start, how)
        return found

    def _all(self, text: str, within: tuple[int, ...]) -> list[re.Match[str]]:
        matches = list(self._pattern.finditer(text, *within))
        start = within[0] if within else 0
        for match in matches:
            self._count(match, text, start, "search")
            start = match.end() + (match.start() == match.end())
        if start <= len(text):
            self._count(None if not matches else ..., text, start, "search")
        return matches

    def _count(self, found: Any, text: str, start: int, how: str) -> None:
        """Match again; `found` is where the real one was, or ... where nobody knows."""
        before = sys.gettrace()
        sys.settrace(None)
        matcher = Matcher(self._pattern, text)
        span = matcher.find(start, how)
        self._work.steps += matcher.steps
        sys.settrace(before)
        assert found is ... or span == (found and found.span()), (self._pattern, text[:80], span, found)


class CountedModule:
    """What the package uses of `re`."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def __getattr__(self, name: str) -> Any:
        if name not in ("match", "fullmatch", "search", "finditer", "findall", "split", "sub"):
            return getattr(re, name)

        def counted(pattern: str | re.Pattern[str], *arguments: Any, flags: int = 0) -> Any:
            texts = 2 if name == "sub" else 1
            flags = arguments[texts] if len(arguments) > texts and name not in ("split", "sub") else flags
            return getattr(Counted(re.compile(pattern, flags), self._work), name)(*arguments[:texts])

        return counted


class Matcher:
    """Finds an expression in a text as `re` does, by trying one way after the other, and counts what it tries."""

    def __init__(self, pattern: re.Pattern[str], text: str) -> None:
        self.steps = 0
        self._nodes, self._flags, self._alone = _parsed(pattern)
        self._text = text
        self._groups: dict[int, tuple[int, int]] = {}

    def find(self, start: int, how: str) -> tuple[int, int] | None:
        """Where the first match lies. `how` is search, match or fullmatch."""
        whole = len(self._text) if how == "fullmatch" else None
        for place in range(start, len(self._text) + 1 if how == "search" else start + 1):
            self._groups.clear()
            end = self._walk(self._nodes, 0, place, self._flags, lambda p: p if whole in (None, p) else None)
            if end is not None:
                return place, end
        return None

    def _walk(self, nodes: Any, index: int, place: int, flags: int, then: Then) -> int | None:
        self.steps += 1
        if index == len(nodes):
            return then(place)
        name, argument = nodes[index][0].name, nodes[index][1]

        def rest(p: int) -> int | None:
            return self._walk(nodes, index + 1, p, flags, then)

        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            return self._repeat(argument, place, flags, name == "MAX_REPEAT", rest)
        if name == "BRANCH":
            ways = (self._walk(way, 0, place, flags, rest) for way in argument[1])
            return next((end for end in ways if end is not None), None)
        if name == "SUBPATTERN":
            return self._group(argument, place, flags, rest)
        if name == "GROUPREF":
            start, end = self._groups.get(argument, (0, -1))
            same = end >= start and self._text.startswith(self._text[start:end], place)
            return rest(place + end - start) if same else None
        if name in ("ASSERT", "ASSERT_NOT") and argument[0] > 0:
            holds = self._walk(argument[1], 0, place, flags, lambda p: p) is not None
            return rest(place) if holds == (name == "ASSERT") else None
        return (
            rest(place + (name not in ("AT", "ASSERT", "ASSERT_NOT")))
            if self._fits(nodes[index], place, flags)
            else None
        )

    def _fits(self, node: Node, place: int, flags: int) -> bool:
        """Whether one character, or what stands around a place, is as it should be: that is left to `re`."""
        key = id(node), flags
        if key not in self._alone:
            self._alone[key] = _alone(node, flags)
        return self._alone[key].match(self._text, place) is not None

    def _group(self, argument: Any, place: int, flags: int, rest: Then) -> int | None:
        number, added, removed, inside = argument
        before = dict(self._groups)

        def after(p: int) -> int | None:
            if number is not None:
                self._groups[number] = place, p
            return rest(p)

        end = self._walk(inside, 0, place, (flags | added) & ~removed, after)
        if end is None:
            self._groups = before
        return end

    def _repeat(self, argument: Any, place: int, flags: int, greedy: bool, rest: Then) -> int | None:
        least, most, inside = argument
        if len(inside) == 1 and inside[0][0].name in ("LITERAL", "NOT_LITERAL", "IN", "ANY"):
            return self._run(inside[0], least, int(most), place, flags, greedy, rest)

        def again(count: int, here: int) -> int | None:
            def next_time(p: int) -> int | None:
                return None if p == here and count >= least else again(count + 1, p)

            def once_more() -> int | None:
                return self._walk(inside, 0, here, flags, next_time) if count < int(most) else None

            end = once_more() if greedy or count < least else rest(here)
            if end is not None or count < least:
                return end
            return rest(here) if greedy else once_more()

        return again(0, place)

    def _run(self, node: Node, least: int, most: int, place: int, flags: int, greedy: bool, rest: Then) -> int | None:
        """A repeated character."""
        longest = 0
        while longest < min(most, len(self._text) - place) and self._fits(node, place + longest, flags):
            longest += 1
            self.steps += 1
            if not greedy and longest > least and (end := rest(place + longest - 1)) is not None:
                return end
        counts = range(longest, least - 1, -1) if greedy else range(max(longest, least), longest + 1)
        ends = (rest(place + count) for count in counts)
        return next((end for end in ends if end is not None), None)


@functools.cache
def _parsed(pattern: re.Pattern[str]) -> tuple[Any, int, dict[tuple[int, int], re.Pattern[str]]]:
    """Its nodes, its flags, and a place for the expressions that its nodes are by themselves."""
    return parser.parse(pattern.pattern, pattern.flags & ~re.UNICODE), pattern.flags, {}


def _alone(node: Node, flags: int) -> re.Pattern[str]:
    """The expression that is one node of another."""
    state = parser.State()
    state.flags, state.str = flags, None
    compiled: re.Pattern[str] = compiler.compile(parser.SubPattern(state, [node]), flags)
    return compiled
