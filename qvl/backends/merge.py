"""Several streams of answers as one: what a request with several prompts needs. Knows indices and counts only."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from qvl.types import Delta, Usage


async def merge(streams: Sequence[AsyncGenerator[Delta, None]], n: int) -> AsyncGenerator[Delta, None]:
    """The deltas of all `streams` as they come; answer j of stream i gets the index `i * n + j`.

    `usage` is the running total of all. The first error of any stream ends all of them; so does closing this one.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for one in only:
                yield one
        return
    arrived: asyncio.Queue[tuple[int, Delta | None]] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    arrived.put_nowait((number, delta))
        finally:
            arrived.put_nowait((number, None))

    tasks = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(streams)]
    usages = [Usage()] * len(streams)
    left = len(streams)
    try:
        while left:
            number, delta = await arrived.get()
            if delta is None:
                left -= 1
                await tasks[number]
                continue
            usages[number] = delta.usage
            yield dataclasses.replace(delta, index=number * n + delta.index, usage=_total(usages))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _total(usages: Sequence[Usage]) -> Usage:
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
    )
