"""What is prepared in a thread: announced, failed, left, and never lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qvl.backends.preparing import Preparing
from qvl.errors import BadMedia
from qvl.media.given_up import is_given_up
from tests.backends.conftest import until

LIMIT = 120  # seconds
Announce = Callable[[str], None]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


class Gate:
    """Work that announces "a", waits to be let through, and then returns or fails."""

    def __init__(self, error: Exception | None = None, announces: bool = True) -> None:
        self.open = threading.Event()
        self.begun = threading.Event()
        self.wanted = True
        self._error, self._announces = error, announces

    def __call__(self, announce: Announce) -> str:
        if self._announces:
            announce("a")
        self.begun.set()
        assert self.open.wait(LIMIT)
        self.wanted = not is_given_up()
        if self._error is not None:
            raise self._error
        return "a"


async def test_what_is_announced_is_known_before_it_is_over(pool: ThreadPoolExecutor) -> None:
    work, thrown, failed = Gate(), list[str](), list[BaseException]()
    preparing = Preparing(pool, work, thrown.append)
    assert await preparing.known() == "a"
    preparing.used(failed.append)
    assert not work.open.is_set()
    work.open.set()
    await until(lambda: preparing._over, "it never ends")
    preparing.leave()
    assert (thrown, failed) == ([], [])


async def test_without_an_announcement_the_result_is_known(pool: ThreadPoolExecutor) -> None:
    work = Gate(announces=False)
    work.open.set()
    preparing = Preparing(pool, work, lambda _: None)
    assert await preparing.known() == "a"
    preparing.leave()


async def test_a_failure_after_the_announcement_reaches_who_uses_it(pool: ThreadPoolExecutor) -> None:
    work, failed = Gate(BadMedia("damaged")), list[BaseException]()
    preparing = Preparing(pool, work, lambda _: None)
    assert await preparing.known() == "a"
    preparing.used(failed.append)
    work.open.set()
    await until(lambda: bool(failed), "nobody was told")
    assert isinstance(failed[0], BadMedia)
    preparing.leave()


async def test_a_failure_between_announcement_and_use_is_not_lost(pool: ThreadPoolExecutor) -> None:
    """A damaged file fails at once: the loop may hear of both before the task that waits goes on."""
    work, failed = Gate(BadMedia("damaged")), list[BaseException]()
    work.open.set()
    preparing = Preparing(pool, work, lambda _: None)
    await until(lambda: preparing._over, "it never ends")
    assert await preparing.known() == "a"
    preparing.used(failed.append)
    assert isinstance(failed[0], BadMedia)
    preparing.leave()


async def test_a_failure_before_it_is_raised(pool: ThreadPoolExecutor) -> None:
    work = Gate(BadMedia("damaged"), announces=False)
    work.open.set()
    preparing = Preparing(pool, work, lambda _: None)
    with pytest.raises(BadMedia):
        await preparing.known()
    preparing.leave()


@pytest.mark.parametrize("error", [None, BadMedia("damaged")])
async def test_who_leaves_before_it_is_used_throws_it_away_when_it_is_over(
    error: Exception | None, pool: ThreadPoolExecutor
) -> None:
    work, thrown = Gate(error), list[str]()
    preparing = Preparing(pool, work, thrown.append)
    asking = asyncio.ensure_future(preparing.known())
    assert await asyncio.to_thread(work.begun.wait, LIMIT)
    asking.cancel()
    preparing.leave()
    assert thrown == [], "a thread still works on it"
    work.open.set()
    await until(lambda: thrown == ["a"], "it was lost")
    assert not work.wanted


async def test_who_leaves_after_the_end_throws_it_away_at_once(pool: ThreadPoolExecutor) -> None:
    work, thrown = Gate(), list[str]()
    work.open.set()
    preparing = Preparing(pool, work, thrown.append)
    await preparing.known()
    await until(lambda: preparing._over, "it never ends")
    preparing.leave()
    preparing.leave()
    assert thrown == ["a"]
