"""The tasks that a folder can be asked by name."""

from __future__ import annotations

import pytest

from qvl.errors import ConfigError
from qvl.tasks import registry


def test_every_name_is_a_question_about_one_picture() -> None:
    assert {"ocr", "translate", "table", "solve", "describe"} <= set(registry.TASKS)
    for name, task in registry.TASKS.items():
        prompt, fields = registry.question(name)
        assert prompt == task.prompt and "image" in task.accepts
        assert fields == {"temperature": 0.0, "max_tokens": task.max_tokens}


def test_a_name_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"'tabel'.*did you mean 'table'"):
        registry.question("tabel")
