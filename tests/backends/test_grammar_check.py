"""Hostile schemas, regular expressions and grammars: a verdict in bounded time, and the next one is served."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from qvl.backends import grammar_check
from qvl.backends.grammar_check import GrammarCheck
from qvl.engine.grammar_worker import CPU_SECONDS
from qvl.errors import InvalidRequest, Overloaded, Unavailable
from qvl.types import Constraint


@pytest.fixture
async def checker(checkpoint: Path) -> AsyncIterator[GrammarCheck]:
    checker = GrammarCheck(checkpoint)
    yield checker
    await checker.close()


def nested(depth: int, wrap: Any) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = wrap(schema)
    return schema


def doubling(head: str, tail: str, count: int) -> str:
    lines = [
        f"start: {head}0",
        *(f"{head}{i}: {head}{i + 1} {head}{i + 1}" for i in range(count)),
        f"{head}{count}: {tail}",
    ]
    return "\n".join(lines)


def chain(count: int) -> str:
    return "\n".join(["start: a0", *(f"a{i}: a{i + 1}" for i in range(count)), f'a{count}: "x"'])


HOSTILE = {
    "nested oneOf": Constraint.json(nested(10, lambda s: {"oneOf": [s, {"type": "array", "items": s}]})),
    "nesting": Constraint("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "recursion": Constraint.json({"$defs": {"n": {"properties": {"l": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}),
    "itself": Constraint.json({"$ref": "#"}),
    "(a+)+b": Constraint.regex("(a+)+b"),
    "quadratic": Constraint.regex("a?" * 30_000),
    "long literal": Constraint.regex("abcdefg" * 9000),
    "products of patterns": Constraint.grammar("start: T\nT: " + " & ".join(f"/(.*{i}.*)/" for i in range(60))),
    "doubled terminals": Constraint.grammar(doubling("T", '"x"', 40)),
    "doubled rules": Constraint.grammar(doubling("a", '"x"', 60)),
    "long chain": Constraint.grammar(chain(4800)),
    "6000 values": Constraint.json({"enum": [f"x{i}" for i in range(6000)]}),
    "1500 properties": Constraint.json({"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
}
HARMLESS = {"recursion", "(a+)+b", "long chain", "6000 values", "1500 properties"}


async def verdict(checker: GrammarCheck, constraint: Constraint) -> str | None:
    try:
        await checker.check(constraint)
    except InvalidRequest as error:
        return error.message
    return None


async def test_hostile_ones_get_a_verdict_and_the_next_is_served(checker: GrammarCheck) -> None:
    """No limit on the time here: the worker's own, in seconds of its CPU, ends it."""
    verdicts = {}
    for name, constraint in HOSTILE.items():
        verdicts[name] = await verdict(checker, constraint)
        await checker.check(Constraint.choice([name]))
    accepted = {name for name, told in verdicts.items() if told is None}
    assert accepted - {"long literal"} == HARMLESS  # how long its tokens take depends on the machine
    assert "too long" in str(verdicts["quadratic"])


async def test_the_loop_goes_on_and_the_same_is_not_tried_twice(checker: GrammarCheck) -> None:
    await checker.check(Constraint.json())
    hostile = Constraint.regex("a?" * 30_000)
    trying = asyncio.create_task(checker.check(hostile))
    ticks = 0
    while not trying.done():
        await asyncio.sleep(0.01)
        ticks += 1
    assert ticks > 10 * CPU_SECONDS
    with pytest.raises(InvalidRequest):
        await trying
    with pytest.raises(InvalidRequest, match="too long"):
        await checker.check(hostile)
    assert checker._process is None, "the verdict was remembered"


async def test_many_at_once_are_refused_and_leavers_do_no_harm(
    checker: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "MOST_WAITING", 3)
    tasks = [asyncio.create_task(checker.check(Constraint.choice([f"{i}"]))) for i in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results[:1] + results[3:]] == [asyncio.CancelledError, Overloaded, Overloaded]
    assert results[1:3] == [None, None]
    with pytest.raises(InvalidRequest, match="Unimplemented"):
        await checker.check(Constraint.json({"not": {}}))
    await checker.check(Constraint.choice(["0"]))


async def test_no_verdict_is_passed_on_what_was_not_tried(
    checker: GrammarCheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is suspended, or far too busy, says nothing about a schema."""
    await checker.check(Constraint.json())
    assert checker._process is not None
    os.kill(checker._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_check, "WALL_SECONDS", 0.1)
        with pytest.raises(Overloaded, match="try again"):
            await checker.check(Constraint.choice(["a"]))
    await checker.check(Constraint.choice(["a"]))


async def test_the_process_ends_with_its_owner(checkpoint: Path) -> None:
    checker = GrammarCheck(checkpoint)
    await checker.check(Constraint.json())
    assert checker._process is not None
    pid = checker._process.pid
    os.kill(pid, 0)
    await checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    checker = GrammarCheck(tmp_path)
    with pytest.raises(Unavailable):
        await checker.check(Constraint.json())
    await checker.close()
