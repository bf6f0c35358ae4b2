"""What a command about two pictures does: read both, ask when it must, write what comes. Does not know the flags."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from qvl.cli.tasks.perform import How, find_model
from qvl.cli.tasks.pictures import check_name, save
from qvl.cli.tasks.sink import keep_inputs, open_sink
from qvl.cli.tasks.status import Status, tell
from qvl.cli.who import Who
from qvl.errors import InvalidRequest, QvlError
from qvl.tasks.base import Growing, Model, Task
from qvl.tasks.comparison import Compare, Comparison
from qvl.tasks.differences import draw_difference
from qvl.tasks.inputs import STDIN, Item, Pages, Reading, items
from qvl.tasks.pictures import pixels_of
from qvl.tasks.run import Outcome, asking, resolution_for
from qvl.types import Completion, MediaPart, Message, Part, SamplingParams


def perform_pair(task: Compare, how: How, who: Who, draw: str | None) -> int:
    """The exit code. A model is looked for, or loaded, only when something is to be asked."""
    find = functools.cache(lambda: find_model(who, quiet=how.quiet))
    pair = _items(how, find)
    if how.output is not None:
        keep_inputs(Path(how.output).expanduser(), pair)
    sink = open_sink(how.output, pair[:1], task, as_json=how.as_json)
    drawing = None if draw is None else _drawing(draw, pair)
    chosen: Task[Comparison] = task.with_max_tokens(how.max_tokens)
    with Status(task.name, pair[1:], quiet=how.quiet) as status, sink:
        shown = status.around(sink.grow) if how.to_terminal else None

        def ask(
            messages: tuple[Message, ...], sampling: SamplingParams, growing: Growing | None = None, /
        ) -> Completion:
            return asking(find(), None, status.hear, shown)(messages, sampling, growing)

        parts = [_load(item) for item in pair]
        result = chosen.answer(ask, parts)
        status.clear()
        named = {"first": pair[0].title, "second": pair[1].title}
        sink.put(Outcome(pair[0], replace(result, data={**named, **result.data})))
        if not how.quiet:
            for note in result.notes:
                tell(note)
        if drawing is not None:
            assert isinstance(parts[0], MediaPart), "a picture was asked about"
            save(draw_difference(pixels_of(parts[0]), result.value.pixels), drawing)
    return 0


def _items(how: How, find: Callable[[], Model]) -> list[Item]:
    """The two inputs. Raises `InvalidRequest` where one of them names several pictures."""
    if list(how.inputs) == [STDIN, STDIN]:
        raise InvalidRequest("standard input is one picture: name a file for the other")
    pages = None if how.pages is None else Pages.parse(how.pages)
    reading = Reading(Compare.accepts, pages, lambda: resolution_for(find(), how.dpi), sys.stdin.buffer.read)
    pair = []
    for source in how.inputs:
        found = items([source], reading)
        if len(found) != 1:
            raise InvalidRequest(f"{source} holds {len(found)} pictures: name one of them, a PDF's with --pages N")
        pair += found
    return pair


def _load(item: Item) -> Part:
    try:
        return item.load()
    except QvlError as error:
        raise error.about(item.title) from None


def _drawing(draw: str, pair: list[Item]) -> Path:
    path = Path(draw).expanduser()
    check_name(path)
    keep_inputs(path, pair)
    return path
