"""Python's search for garbage in cycles, kept away from what a start has loaded.

A full search goes through every object there is: some hundred thousand once torch, or a web framework, is imported,
which takes tens of milliseconds in the middle of somebody's answer. Knows no engine.
"""

from __future__ import annotations

import gc

STEP_OBJECTS = 10_000  # a step makes thousands that live for its length; Python would search after every 700


def settle(*, seldom: bool = False) -> None:
    """What is there now will stay: it is not searched again. `seldom`: search for new garbage after many objects only,
    where none of it holds much memory.
    """
    gc.freeze()
    if seldom:
        gc.set_threshold(STEP_OBJECTS)
