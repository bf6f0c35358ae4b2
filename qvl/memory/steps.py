"""What a rule may ask for while it runs, and the loops that answer: blocking or awaited.

A machine is a generator that yields steps and returns its result; errors of a call are thrown into it. Knows nothing of
what the machines decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from qvl.client.questions import Done, advance
from qvl.errors import QvlError
from qvl.types import Completion, Message, SamplingParams

T = TypeVar("T")
Messages: TypeAlias = tuple[Message, ...]

# What a call may raise that the machine is told of; anything else is a bug and flies past it.
FAILURES = (QvlError, OSError, asyncio.TimeoutError)


@dataclass(frozen=True, slots=True)
class Count:
    """To be answered with the exact tokens of the prompt of `messages`, pictures and the answer's opening included."""

    messages: Messages


@dataclass(frozen=True, slots=True)
class Ask:
    """To be answered with the model's `Completion`."""

    messages: Messages
    sampling: SamplingParams


Step: TypeAlias = Count | Ask
Machine: TypeAlias = Generator[Step, Any, T]


CountCall: TypeAlias = Callable[[Messages], int]
AskCall: TypeAlias = Callable[[Messages, SamplingParams], Completion]
AsyncCountCall: TypeAlias = Callable[[Messages], Awaitable[int]]
AsyncAskCall: TypeAlias = Callable[[Messages, SamplingParams], Awaitable[Completion]]


def changed(machine: Machine[T], change: Callable[[Messages], Messages]) -> Machine[T]:
    """`machine`, whose steps are asked with what `change` makes of their messages."""
    step = advance(machine)
    while not isinstance(step, Done):
        try:
            answer = yield replace(step, messages=change(step.messages))
        except FAILURES as error:
            step = advance(machine, error=error)
        else:
            step = advance(machine, answer)
    result: T = step.value
    return result


def drive(machine: Machine[T], count: CountCall, ask: AskCall) -> T:
    """Run `machine` to its end with calls that block."""
    step = advance(machine)
    while not isinstance(step, Done):
        try:
            answer = count(step.messages) if isinstance(step, Count) else ask(step.messages, step.sampling)
        except FAILURES as error:
            step = advance(machine, error=error)
        else:
            step = advance(machine, answer)
    result: T = step.value
    return result


async def adrive(machine: Machine[T], count: AsyncCountCall, ask: AsyncAskCall) -> T:
    """Run `machine` to its end with calls that are awaited; what it does itself happens in worker threads."""
    step = await asyncio.to_thread(advance, machine)
    while not isinstance(step, Done):
        try:
            answer: Any
            if isinstance(step, Count):
                answer = await count(step.messages)
            else:
                answer = await ask(step.messages, step.sampling)
        except FAILURES as error:
            step = await asyncio.to_thread(advance, machine, None, error)
        else:
            step = await asyncio.to_thread(advance, machine, answer)
    result: T = step.value
    return result
