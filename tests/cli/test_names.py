"""Several names after one flag: which words of a command line they are."""

from __future__ import annotations

import pytest

from qvl.cli.app import run
from qvl.cli.names import with_flag_repeated

CASES = {
    "m --served-model-name a b c": "m --served-model-name a --served-model-name b --served-model-name c",
    "m --served-model-name=a b": "m --served-model-name=a --served-model-name b",
    "m --served_model_name a b --seed 7": "m --served_model_name a --served-model-name b --seed 7",
    "--seed 7 m --served-model-name a b": "--seed 7 m --served-model-name a --served-model-name b",
    "--eager m --served-model-name a b": "--eager m --served-model-name a --served-model-name b",
    "m --served-model-name a --eager b": "m --served-model-name a --eager b",  # b is an argument too many
    "--served-model-name a m": "--served-model-name a m",
    "--served-model-name a m b": "--served-model-name a m b",
    "--seed -1 m --served-model-name a b": "--seed -1 m --served-model-name a --served-model-name b",
    "m --seed --served-model-name a b": "m --seed --served-model-name a b",  # the value of --seed, as click has it
    "m --served-model-name a -- b": "m --served-model-name a -- b",
}


@pytest.mark.parametrize(("given", "meant"), CASES.items())
def test_which_words_are_names(given: str, meant: str) -> None:
    assert " ".join(with_flag_repeated(given.split(), {"--eager"})) == meant


@pytest.mark.parametrize("words", [["demo", "--access-log", "b"], ["demo", "b", "--served-model-name", "a"]])
def test_other_words_too_many_are_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """`--access-log` takes no value, which the real command has to say."""
    assert run(["serve", *words]) == 2
    assert "unexpected extra argument" in capsys.readouterr().err
