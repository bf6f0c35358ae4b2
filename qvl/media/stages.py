"""How long each stage of a picture takes, for whoever wants to know: a clock around the functions that do the work.

Knows names and seconds, and who listens in this thread. Costs nothing to speak of where nobody does. A stage inside
another (a frame resized while its video is decoded) is counted once, as its own.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from qvl.types import MediaKind

P = ParamSpec("P")
T = TypeVar("T")
Listener: TypeAlias = Callable[[MediaKind, str, float], None]


class HasKind(Protocol):
    """A picture or a video."""

    @property
    def kind(self) -> MediaKind: ...


M = TypeVar("M", bound=HasKind)


class _Clock:
    """Seconds by stage of one picture or video, without those of the stages inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = 0.0


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_clock: ContextVar[_Clock | None] = ContextVar("clock", default=None)


@contextmanager
def heard_by(listener: Listener | None) -> Iterator[None]:
    """In this block (and thread) `listener(kind, stage, seconds)` is called for each stage of each medium loaded."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def reported(load: Callable[Concatenate[M, P], T]) -> Callable[Concatenate[M, P], T]:
    """`load`, whose first argument is a picture or video: its stages are told when it has succeeded."""

    @functools.wraps(load)
    def reporting(medium: M, /, *args: P.args, **kwargs: P.kwargs) -> T:
        listener = _listener.get()
        if listener is None:
            return load(medium, *args, **kwargs)
        clock = _Clock()
        token = _clock.set(clock)
        try:
            loaded = load(medium, *args, **kwargs)
        finally:
            _clock.reset(token)
        for stage, seconds in clock.seconds.items():
            listener(medium.kind, stage, seconds)
        return loaded

    return reporting


def stage(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Marks a function as the work of stage `name`."""

    def mark(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            clock = _clock.get()
            if clock is None:
                return function(*args, **kwargs)
            outside, clock.inside = clock.inside, 0.0
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.perf_counter() - started
                clock.seconds[name] = clock.seconds.get(name, 0.0) + whole - clock.inside
                clock.inside = outside + whole

        return timed

    return mark
