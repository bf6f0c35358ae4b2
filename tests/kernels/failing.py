"""A kernel's trial that does not go well, for tests of what is then used instead."""

from __future__ import annotations

from collections.abc import Callable

PROBLEMS = ["wrong numbers", "raises"]


def failing(problem: str) -> Callable[..., str]:
    """A trial that tells this problem, or for "raises" an error as from a compiler."""

    def fails(*_: object) -> str:
        if problem == "raises":
            raise OSError("no compiler")
        return problem

    return fails


def words_of(problem: str) -> str:
    """What a warning says of it."""
    return "OSError: no compiler" if problem == "raises" else problem
