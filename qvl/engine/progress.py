"""A progress bar on standard error for those who wait for many answers. Knows counts only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # called with the tokens of one more finished request


@contextmanager
def progress_bar(total: int, enabled: bool) -> Iterator[Advance]:
    """A bar over `total` requests with the rate of generated tokens; silent unless standard error is a terminal."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    rate = TextColumn("{task.fields[rate]:.0f} tok/s")
    bar = Progress(*columns, rate, console=console, disable=not (enabled and console.is_terminal), transient=False)
    with bar:
        task = bar.add_task("", total=total, rate=0.0)
        tokens = 0

        def advance(num_tokens: int) -> None:
            nonlocal tokens
            tokens += num_tokens
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, advance=1, rate=tokens / elapsed if elapsed > 0 else 0.0)

        yield advance
