"""Objects of a start are left alone by Python's search for garbage, later ones are not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from qvl.engine.garbage import STEP_OBJECTS, settle


class Ring:
    """Garbage that only a search finds."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_what_is_there_stays_and_what_comes_later_is_searched() -> None:
    early = Ring()
    settle()
    late = Ring()
    alive, dead = weakref.ref(early), weakref.ref(late)
    del early, late
    gc.collect()
    assert alive() is not None
    assert dead() is None


def test_a_server_searches_as_often_as_before_and_an_engine_seldom() -> None:
    before = gc.get_threshold()
    settle()
    assert gc.get_threshold() == before
    settle(seldom=True)
    assert gc.get_threshold()[0] == STEP_OBJECTS
