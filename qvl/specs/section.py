"""Typed reading of a checkpoint's JSON files: every complaint names the file and the key.

Knows JSON objects. Does not know what any key means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvl.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Section:
    """One JSON object of `file`; `prefix` is its place in there ("vision_config.")."""

    file: str
    values: Mapping[str, Any]
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self.values.get(key) is not None

    def fail(self, key: str, says: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: '{self.prefix}{key}' {says}")

    def first(self, *keys: str) -> str:
        """The first of several spellings that is there, else the first spelling."""
        return next((key for key in keys if key in self), keys[0])

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.fail(key, "is missing")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise self.fail(key, f"must be an integer of at least {low}, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < low:
            raise self.fail(key, f"must be a number of at least {low:g}, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, not {value!r}")
        return value

    def triple(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """Three numbers."""
        value = self._get(key, default)
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise self.fail(key, f"must be a list of three numbers, not {value!r}")
        inner = Section(self.file, {f"{key}[{i}]": item for i, item in enumerate(value)}, self.prefix)
        return inner.number(f"{key}[0]"), inner.number(f"{key}[1]"), inner.number(f"{key}[2]")

    def section(self, key: str) -> Section:
        """The object under `key`, empty when it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.fail(key, f"must be an object, not {value!r}")
        return Section(self.file, value, f"{self.prefix}{key}.")


def read_section(folder: Path, file: str, *, required: bool = False) -> Section:
    """The object in `folder`/`file`; empty when the file is missing and not required. Raises `CheckpointError`."""
    path = folder / file
    if not path.is_file():
        if required:
            raise CheckpointError(f"{folder}: {file} is missing; is this the folder of a Hugging Face checkpoint?")
        return Section(file, {})
    try:
        values = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: nested too deeply") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return Section(file, values)
