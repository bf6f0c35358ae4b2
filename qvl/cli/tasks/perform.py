"""What every task's command does: find who answers, ask about every input, write what comes, tell what failed.

Does not know any task: `qvl.tasks` does. Results go to standard output or to files, everything else to standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from qvl.cli.answer import is_piped
from qvl.cli.tasks.sink import Sink, open_sink
from qvl.cli.tasks.status import Status, tell
from qvl.cli.who import Who, find
from qvl.errors import InvalidRequest, QvlError, RequestFailed
from qvl.tasks.base import Model, Task
from qvl.tasks.inputs import STDIN, Item, Pages, Reading, items
from qvl.tasks.run import Outcome, resolution_for, run
from qvl.types import DEFAULT_URL

TOLD_FAILURES = 20
BUSY_RETRIES = 6  # of a request that a server did not take: a quarter of a minute


@dataclass(frozen=True, slots=True)
class How:
    """What is asked about, and what becomes of the results."""

    inputs: Sequence[str]
    pages: str | None = None
    dpi: float | None = None
    output: str | None = None
    as_json: bool = False
    quiet: bool = False
    max_tokens: int | None = None

    @property
    def to_terminal(self) -> bool:
        """Whether a person reads the texts; the text of a single input is then shown while its answer comes."""
        return self.output is None and not self.as_json and sys.stdout.isatty()


def perform(task: Task[Any], how: How, who: Who, *, extra: Callable[[Sequence[Item]], Sink] | None = None) -> int:
    """The exit code: 0, or 1 when some of several inputs failed. The error of a single one is raised, and names it.

    `extra` makes a sink for what comes of the inputs besides the texts, such as pictures.
    """
    task = task.with_max_tokens(how.max_tokens)
    sources = how.inputs or _standard_input(task)
    pages = None if how.pages is None else Pages.parse(how.pages)
    reading = Reading(task.accepts, pages, lambda: resolution_for(model, how.dpi), sys.stdin.buffer.read)
    found = items(sources, reading)
    failed: list[Outcome[Any]] = [Outcome(item, error=item.error) for item in found if item.error is not None]
    sink = open_sink(how.output, found, task, as_json=how.as_json)
    besides = None if extra is None else extra(found)
    if len(failed) < len(found):
        model = find_model(who, quiet=how.quiet)
        streamed = how.to_terminal and len(found) == 1
        failed = _ask(task, found, model, (sink, besides), who.concurrency, quiet=how.quiet, streamed=streamed)
    else:  # there is nothing to load a model for
        with sink:
            for outcome in failed:
                sink.put(outcome)
    return _verdict(failed, len(found))


def _ask(
    task: Task[Any],
    found: list[Item],
    model: Model,
    sinks: tuple[Sink, Sink | None],
    concurrency: int,
    *,
    quiet: bool,
    streamed: bool,
) -> list[Outcome[Any]]:
    """Ask about all items and write what comes. What failed."""
    failed: list[Outcome[Any]] = []
    sink, besides = sinks
    status = Status(task.name, found, quiet=quiet)
    shown = status.around(sink.grow) if streamed else None
    outcomes = run(task, found, model, concurrency=concurrency, heard=status.hear, shown=shown)
    with status, sink, closing(outcomes):
        for outcome in outcomes:
            status.clear()
            sink.put(outcome)
            if outcome.result is None:
                failed.append(outcome)
            else:
                if not quiet:
                    _tell_notes(outcome.item, outcome.result.notes, len(found))
                failed += _put_besides(besides, outcome)
            status.advance()
    return failed


def _put_besides(sink: Sink | None, outcome: Outcome[Any]) -> list[Outcome[Any]]:
    """What failed of it: the text of the result is out already, and the other inputs go on."""
    try:
        if sink is not None:
            sink.put(outcome)
    except QvlError as error:
        return [replace(outcome, error=error)]
    return []


def find_model(who: Who, *, quiet: bool) -> Model:
    """Who answers; a server that is busy is waited for, since many pictures may want it at once."""
    return find(who, DEFAULT_URL, quiet=quiet, retries=BUSY_RETRIES).model


def _standard_input(task: Task[Any]) -> list[str]:
    if not is_piped(sys.stdin.buffer):
        noun = "picture" if "image" in task.accepts else "video"
        raise InvalidRequest(f"name a {noun}: qvl {task.name} FILE")
    return [STDIN]


def _tell_notes(item: Item, notes: Sequence[str], total: int) -> None:
    for note in notes:
        tell(f"{item.title}: {note}" if total > 1 else note)


def _verdict(failed: list[Outcome[Any]], total: int) -> int:
    """Tell what failed."""
    errors = [(outcome.item, outcome.error) for outcome in failed if outcome.error is not None]
    if not errors:
        return 0
    if total == 1:
        [(item, error)] = errors
        is_of_input = isinstance(error, InvalidRequest | RequestFailed) and item.file != STDIN
        raise error.about(item.title) if is_of_input else error
    tell(f"{len(errors)} of {total} failed:")
    for item, error in errors[:TOLD_FAILURES]:
        tell(f"  {item.title}: {error.message}")
    if len(errors) > TOLD_FAILURES:
        tell(f"  and {len(errors) - TOLD_FAILURES} more")
    return 1
