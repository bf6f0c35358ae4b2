"""How many requests are under way: against a simulated server for the rule, on a real loop for the gate."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from qvl.batch.pace import START, Gate, Limit


def simulate(limit: Limit, served: Callable[[float], int], answers: int, *, queue: int | None = None) -> list[int]:
    """The limit after each answer of a server that works on `served(time)` requests at once, each taking about 1 s.

    What is above waits in its queue; above `queue` it says that it is busy, and the client asks again at once.
    """
    chance = random.Random(3)
    now, waiting, working, values = 0.0, 0, [], []
    while len(values) < answers:
        room = limit.value - waiting - len(working)
        for _ in range(room):
            if queue is not None and waiting + len(working) >= served(now) + queue:
                limit.busy(now, now)
                break
            waiting += 1
        while waiting and len(working) < served(now):
            waiting -= 1
            heapq.heappush(working, now + chance.uniform(0.7, 1.3))
        now = heapq.heappop(working)
        limit.answered(now)
        values.append(limit.value)
    return values


@pytest.mark.parametrize("served", [4, 24, 100, 1000])
def test_it_finds_what_the_server_gains_from(served: int) -> None:
    """At least as many as the server works on at once, and not many more than it needs."""
    values = simulate(Limit(256), lambda now: served, 8000)
    assert values[-1] >= min(256, served)
    assert max(values) <= max(2 * START, 3 * served)


def test_it_gives_way_to_a_busy_server_and_comes_back() -> None:
    values = simulate(Limit(256), lambda now: 16 if 20 < now < 60 else 128, 12000, queue=8)
    assert min(values) <= 24
    assert values[-1] >= 64


def test_a_fixed_limit_starts_there_and_comes_back_to_it() -> None:
    limit = Limit(40, fixed=True)
    assert limit.value == 40
    limit.busy(sent=0.0, now=1.0)
    assert limit.value == 20
    simulate(limit, lambda now: 100, 2000)
    assert limit.value == 40


def test_what_was_sent_together_is_cut_once() -> None:
    limit = Limit(64, fixed=True)
    for _ in range(64):
        limit.busy(sent=1.0, now=2.0)
    assert limit.value == 32
    for now in range(3, 20):
        limit.busy(sent=now - 0.5, now=now)
    assert limit.value == 1


async def test_the_gate_holds_the_limit_and_keeps_the_order() -> None:
    gate = Gate(Limit(3, fixed=True))
    order: list[int] = []
    most = 0

    async def one(number: int) -> None:
        nonlocal most
        async with gate:
            order.append(number)
            most = max(most, gate.running)
            await asyncio.sleep(0.002)

    await asyncio.gather(*(one(number) for number in range(20)))
    assert (order, most, gate.running) == (list(range(20)), 3, 0)


async def test_nobody_passes_during_a_pause() -> None:
    gate = Gate(Limit(8, fixed=True))
    loop = asyncio.get_running_loop()
    gate.busy(sent=loop.time(), retry_after=0.2)
    begin = loop.time()

    async def one() -> float:
        async with gate:
            return loop.time() - begin

    assert min(await asyncio.gather(*(one() for _ in range(3)))) >= 0.2


async def test_those_who_give_up_take_no_place() -> None:
    gate = Gate(Limit(1, fixed=True))

    async def hold(seconds: float) -> None:
        async with gate:
            await asyncio.sleep(seconds)

    first = asyncio.ensure_future(hold(0.02))
    waiting = [asyncio.ensure_future(hold(0)) for _ in range(3)]
    await asyncio.sleep(0.001)
    waiting[0].cancel()
    await first
    waiting[1].cancel()  # it may just have been let through
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.wait_for(hold(0), 1)
    assert gate.running == 0


async def test_pauses_grow_until_an_answer_comes() -> None:
    gate = Gate(Limit(8, fixed=True))
    loop = asyncio.get_running_loop()

    def pause() -> float:
        now = loop.time()
        gate._paused_until = 0.0  # the last one is over
        gate.busy(sent=now, retry_after=None)
        return gate._paused_until - now

    grown = [pause() for _ in range(10)]
    assert grown[0] == pytest.approx(0.5, abs=0.05)
    assert all(later >= earlier - 0.01 for earlier, later in itertools.pairwise(grown))
    assert grown[-1] == pytest.approx(30, abs=0.1)
    gate.answered()
    assert pause() < 1
