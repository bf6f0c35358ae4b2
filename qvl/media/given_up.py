"""Whether anybody still waits for what a thread is loading. Whoever asked may leave at any time; a thread cannot be
stopped from outside, so that what may wait for long (network, a turn at the cores) looks here now and then.

Knows one flag per request. Does not know who sets it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from qvl.errors import BadMedia

LOOK_EVERY_SECONDS = 0.25

_flag: ContextVar[threading.Event | None] = ContextVar("given_up", default=None)


@contextmanager
def given_up_by(flag: threading.Event) -> Iterator[None]:
    """In this block (and thread, and copies of its context) loading ends soon after `flag` is set."""
    token = _flag.set(flag)
    try:
        yield
    finally:
        _flag.reset(token)


def is_given_up() -> bool:
    """Whether what this thread loads is wanted no more."""
    flag = _flag.get()
    return flag is not None and flag.is_set()


def check_wanted() -> None:
    """Raises `BadMedia` when nobody waits any more; nobody will read what it says."""
    if is_given_up():
        raise BadMedia("the request was given up")


@contextmanager
def turn(gate: threading.Semaphore) -> Iterator[None]:
    """A turn at what `gate` guards. Raises `BadMedia` when nobody waits for it any more."""
    while not gate.acquire(timeout=LOOK_EVERY_SECONDS):
        check_wanted()
    try:
        yield
    finally:
        gate.release()
