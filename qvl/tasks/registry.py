"""The tasks that ask one question about each picture of a folder, by name: what `qvl batch FOLDER --task` offers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qvl.errors import ConfigError, suggest
from qvl.tasks.base import Task
from qvl.tasks.description import Describe
from qvl.tasks.solution import Solve
from qvl.tasks.tables import ReadTable
from qvl.tasks.text import Ocr
from qvl.tasks.translation import Translate

TASKS: Mapping[str, Task[Any]] = {task.name: task for task in (Ocr(), Translate(), ReadTable(), Solve(), Describe())}


def question(name: str) -> tuple[str, dict[str, Any]]:
    """What the task asks about a picture, and the fields of a request's body that it wants. Raises `ConfigError` for a
    name that is none."""
    if name not in TASKS:
        raise ConfigError(f"no task is called '{name}'{suggest(name, TASKS)} (there are {', '.join(TASKS)})")
    task = TASKS[name]
    return task.prompt, {"temperature": task.sampling.temperature, "max_tokens": task.sampling.max_tokens}
