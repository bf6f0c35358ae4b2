"""Private folders: who owns one, who may remove it, and where pixels go."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qvl.backends import scratch
from qvl.backends.scratch import PixelStore, ScratchFolder, remove_stale
from qvl.engine.pixels import map_pixels
from qvl.errors import Overloaded

PIXELS = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)


def age(folder: Path) -> None:
    old = time.time() - 2 * scratch.GRACE_SECONDS
    os.utime(folder, (old, old))


def test_a_folder_is_private_and_goes_when_closed(tmp_path: Path) -> None:
    folder = ScratchFolder(str(tmp_path))
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "x").write_bytes(b"x")
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_only_what_the_dead_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, sys; from qvl.backends.scratch import ScratchFolder;"
        "print(ScratchFolder(sys.argv[1]).path, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    dead = Path(done.stdout.strip())
    alive = ScratchFolder(str(tmp_path))
    stranger = tmp_path / "qvl-other"
    stranger.mkdir()
    link = tmp_path / f"{scratch.PREFIX}link"
    link.symlink_to(stranger)
    assert remove_stale(str(tmp_path)) == [], "a folder that has just been made may not be locked yet"
    for folder in (dead, alive.path, stranger):
        age(folder)
    assert remove_stale(str(tmp_path)) == [dead]
    assert alive.path.is_dir()
    assert stranger.is_dir()
    alive.close()


def test_pixels_come_back_as_they_were_under_every_name(tmp_path: Path) -> None:
    files = PixelStore([tmp_path]).write(PIXELS, copies=3)
    for file in files:
        mapped = map_pixels(file)
        assert mapped is not None
        assert np.array_equal(mapped, PIXELS)
    assert list(tmp_path.iterdir()) == []


def test_discarding_is_harmless_when_they_are_gone(tmp_path: Path) -> None:
    store = PixelStore([tmp_path])
    files = store.write(PIXELS, copies=2)
    map_pixels(files[0])
    store.discard(files)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_is_written_once_while_its_array_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "ROOM_TO_KEEP", 0)
    store = PixelStore([tmp_path])
    pixels = PIXELS.copy()
    inodes = set()
    for copies in (1, 3, 2):
        files = store.write(pixels, copies, keep=True)
        assert len(files) == copies
        inodes |= {os.stat(file.path).st_ino for file in files}
        for file in files:
            mapped = map_pixels(file)
            assert mapped is not None
            assert np.array_equal(mapped, PIXELS)
            mapped[:] = 0  # what the engine has is its own
    assert len(inodes) == 1
    assert len(list(tmp_path.iterdir())) == 1, "the store's own name"
    store.discard(store.write(pixels.copy(), keep=True))
    assert len(list(tmp_path.iterdir())) == 1, "an array that has gone leaves nothing"
    del pixels
    assert list(tmp_path.iterdir()) == []


def test_kept_pixels_whose_folder_was_emptied_are_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "ROOM_TO_KEEP", 0)
    store = PixelStore([tmp_path])
    store.discard(store.write(PIXELS, keep=True))
    for file in tmp_path.iterdir():
        file.unlink()
    (file,) = store.write(PIXELS, keep=True)
    assert np.array_equal(np.fromfile(file.path, dtype=np.uint8), PIXELS.ravel())


def test_threads_that_share_an_array_all_get_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "ROOM_TO_KEEP", 0)
    store = PixelStore([tmp_path])
    alive = [PIXELS.copy()]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: store.write(alive[0], 2, keep=True), range(40)))
    files = [file for files in made for file in files]
    assert len({file.path for file in files}) == 80
    assert all(np.array_equal(map_pixels(file), PIXELS) for file in files)
    alive.clear()
    assert list(tmp_path.iterdir()) == []


def test_where_room_is_short_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_has_room", lambda _, num_bytes: num_bytes < scratch.ROOM_TO_KEEP)
    store = PixelStore([tmp_path])
    store.discard(store.write(PIXELS, keep=True))
    assert list(tmp_path.iterdir()) == []


def test_a_full_place_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, roomy = tmp_path / "full", tmp_path / "roomy"
    full.mkdir()
    roomy.mkdir()
    monkeypatch.setattr(scratch, "_has_room", lambda folder, _: folder == roomy)
    (file,) = PixelStore([full, roomy]).write(PIXELS)
    assert Path(file.path).parent == roomy
    with pytest.raises(Overloaded):
        PixelStore([full]).write(PIXELS)
    assert list(full.iterdir()) == []


def test_socket_paths_stay_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: "/var/" + "x" * 90)
    assert scratch.socket_base() == "/tmp"
