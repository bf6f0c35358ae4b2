"""What `--task NAME` asks about each picture of a folder. The one place to add to, or to take over from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qvl.errors import ConfigError, suggest


@dataclass(frozen=True, slots=True)
class FolderTask:
    """A question about one picture, and the fields of the body that it wants."""

    prompt: str
    fields: Mapping[str, Any] = field(default_factory=dict)


TASKS: Mapping[str, FolderTask] = {
    "ocr": FolderTask("Read the text.", {"temperature": 0.0, "max_tokens": 2048}),
    "describe": FolderTask("Describe this picture.", {"max_tokens": 512}),
}


def task(name: str) -> FolderTask:
    """Raises `ConfigError` for a name that is none."""
    if name not in TASKS:
        raise ConfigError(f"no task is called '{name}'{suggest(name, TASKS)} (there are {', '.join(TASKS)})")
    return TASKS[name]
