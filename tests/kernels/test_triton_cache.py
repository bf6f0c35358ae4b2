"""Triton's folder is left alone where it can be written; elsewhere it gets one that nobody else can write to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvl.kernels.triton_cache import folder_of_cache, settle_cache

NOWHERE = "/dev/null"  # below it there are no folders, for nobody


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a home and without a cache folder; where their temporary files go."""
    monkeypatch.setenv("HOME", NOWHERE)
    monkeypatch.setenv("XDG_CACHE_HOME", NOWHERE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def settled(environment: dict[str, str] | None = None) -> dict[str, str]:
    environment = environment or {}
    settle_cache(environment)
    return environment


def test_a_home_is_left_to_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settled() == {}
    (tmp_path / ".triton" / "cache").chmod(0o777)  # their own business
    assert settled() == {}


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_a_choice_of_the_user_stays(name: str, temporary: Path) -> None:
    assert settled({name: "/srv/kernels"}) == {name: "/srv/kernels"}
    assert list(temporary.iterdir()) == []


def test_the_cache_folder_comes_next(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(temporary / "cache"))
    found = settled()["TRITON_CACHE_DIR"]
    assert found == str(temporary / "cache" / "qvl" / "kernels" / "triton")
    assert Path(found).stat().st_mode & 0o077 == 0
    assert settled() == {"TRITON_CACHE_DIR": found}


@pytest.mark.parametrize("home", [NOWHERE, "~"])
def test_without_one_it_is_among_the_temporary_files(
    home: str, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    found = settled()["TRITON_CACHE_DIR"]
    assert found == str(temporary / f"qvl-triton-{os.getuid()}")
    assert settled() == {"TRITON_CACHE_DIR": found}  # the next start finds what this one compiled


@pytest.mark.parametrize("laid", ["open", "link"])
def test_what_others_could_have_laid_there_is_not_used(laid: str, temporary: Path) -> None:
    name, theirs = temporary / f"qvl-triton-{os.getuid()}", temporary / "theirs"
    theirs.mkdir()
    if laid == "link":
        name.symlink_to(theirs)
    else:
        name.mkdir()
        name.chmod(0o777)
    found = Path(settled()["TRITON_CACHE_DIR"])
    assert found not in (name, theirs) and found.parent == temporary
    assert list(theirs.iterdir()) == []


def test_the_folder_is_that_of_the_variable_or_of_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert folder_of_cache({"TRITON_CACHE_DIR": "/a", "TRITON_HOME": "/b"}) == Path("/a")
    assert folder_of_cache({"TRITON_HOME": "/b"}) == Path("/b/.triton/cache")
    assert folder_of_cache({}) == Path("/home/somebody/.triton/cache")
