"""Memory that an HTTP process shares with the engine: whose places are when, whoever lets go first."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from qvl.backends.room import PIECE_BYTES, PixelRoom, make_room
from qvl.backends.scratch import PixelStore
from qvl.engine.pixels import Pixels, PromisedPixels, Room, map_pixels
from qvl.engine.protocol import NUM_TICKETS, OWN_FILE, ROOM_HEAD, PixelFile

SHAPE = (1, 128, 512, 3)  # three quarters of a piece
FULL = (1, 4 * PIECE_BYTES // 768, 256, 3)  # the whole of a room of four pieces


class Both:
    """A room of `num_pieces` and the engine's view of it."""

    def __init__(self, num_pieces: int = 4) -> None:
        self.room = PixelRoom(num_pieces * PIECE_BYTES)
        engines = Room(self.room.announcement)
        self._rooms = {self.room.announcement.path: engines}
        assert self.room.empty(SHAPE) is None
        assert self.room.hand_over(np.zeros(SHAPE, np.uint8)) == []
        engines.enter()

    def taken(self, file: PixelFile) -> Pixels:
        """What the engine has then."""
        pixels = map_pixels(file, self._rooms)
        assert pixels is not None
        return pixels


def filled(room: PixelRoom, value: int, shape: tuple[int, ...] = SHAPE) -> Pixels:
    pixels = room.empty(shape)
    assert pixels is not None
    pixels.fill(value)
    return pixels


def test_the_engine_sees_what_was_decoded_there() -> None:
    both = Both()
    pixels = both.room.empty((5, 7, 3))
    assert pixels is not None
    pixels[:] = np.arange(105, dtype=np.uint8).reshape(5, 7, 3)
    (file,) = both.room.hand_over(pixels[None])
    seen = both.taken(file)
    assert seen.shape == (1, 5, 7, 3)
    assert np.array_equal(seen[0], pixels)
    assert np.shares_memory(pixels, pixels[None])


@pytest.mark.parametrize("engine_first", [True, False])
def test_a_place_is_free_when_both_have_let_go(engine_first: bool) -> None:
    both = Both()
    ours = filled(both.room, 1, FULL)
    (file,) = both.room.hand_over(ours)
    theirs = both.taken(file)
    assert both.room.empty((1,)) is None
    if engine_first:
        del theirs
    else:
        del ours
    assert both.room.empty((1,)) is None, "the other one still has it"
    if engine_first:
        del ours
    else:
        assert int(theirs.max()) == 1
        del theirs
    assert both.room.empty(FULL) is not None


def test_what_was_handed_over_is_held_before_the_engine_has_heard_of_it() -> None:
    both = Both()
    ours = filled(both.room, 1, FULL)
    (file,) = both.room.hand_over(ours)
    del ours
    assert both.room.empty((1,)) is None
    both.room.take_back(file)  # it never will
    assert both.room.empty((1,)) is not None


def test_views_keep_a_place() -> None:
    """What a decoder fills, `load` reshapes and a cache keeps: never the array that was made first."""
    both = Both()
    whole = np.ascontiguousarray(filled(both.room, 3, FULL)[0])[None]
    (file,) = both.room.hand_over(whole)
    ours, theirs = whole[0][2:], both.taken(file)[0][2:]
    del whole
    assert both.room.empty((1,)) is None
    assert int(theirs.min()) == 3
    del theirs
    assert both.room.empty((1,)) is None
    assert int(ours.min()) == 3
    del ours
    assert both.room.empty((1,)) is not None


def test_one_place_is_handed_over_as_often_as_it_is_asked_for() -> None:
    both = Both()
    pixels = filled(both.room, 9)
    held = [both.taken(file) for _ in range(3) for file in both.room.hand_over(pixels, copies=2)]
    assert len({array.__array_interface__["data"][0] for array in held}) == 1
    del pixels
    while held:
        assert both.room.empty(FULL) is None
        held.pop()
    assert both.room.empty(FULL) is not None


def test_other_pixels_are_copied_and_their_place_goes_with_the_engine() -> None:
    both = Both()
    pixels = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
    (file,) = both.room.hand_over(pixels)
    seen = both.taken(file)
    assert np.array_equal(seen, pixels)
    assert both.room.empty(FULL) is None
    del seen
    assert both.room.empty(FULL) is not None
    assert both.room.hand_over(np.zeros((2, *FULL[1:]), np.uint8)) == [], "larger than the room"


def test_a_part_that_begins_elsewhere_is_copied() -> None:
    both = Both()
    pixels = filled(both.room, 5)
    pixels[:, 1:] = 6
    (file,) = both.room.hand_over(pixels[:, 1:])
    assert np.array_equal(both.taken(file), pixels[:, 1:])


def test_tickets_come_back_and_run_out() -> None:
    both = Both()
    pixels = filled(both.room, 1)
    files = both.room.hand_over(pixels, NUM_TICKETS - 1)
    assert {file.ticket for file in files} == set(range(1, NUM_TICKETS))
    assert both.room.hand_over(pixels) == []
    both.taken(files[17])  # and let go at once
    (file,) = both.room.hand_over(pixels)
    assert file.ticket == files[17].ticket


@pytest.mark.parametrize(
    "wrong",
    [
        {"ticket": NUM_TICKETS},
        {"ticket": -2},
        {"ticket": 0},
        {"offset": 0},
        {"offset": ROOM_HEAD + 4 * PIECE_BYTES},
        {"shape": (5, *FULL[1:])},
        {"shape": (-1, -4, 4, 3)},
        {"path": "/elsewhere"},
    ],
)
def test_what_lies_outside_is_refused(wrong: dict[str, object]) -> None:
    both = Both()
    good = {"path": both.room.announcement.path, "shape": SHAPE, "offset": ROOM_HEAD, "ticket": 1}
    both.taken(PixelFile(**good))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="room"):
        both.taken(PixelFile(**{**good, **wrong}))  # type: ignore[arg-type]


def test_a_room_of_another_size_is_not_shared() -> None:
    room = PixelRoom(PIECE_BYTES)
    with pytest.raises(ValueError, match="room"):
        Room(type(room.announcement)(room.announcement.path, room.announcement.num_bytes + 1))


def test_promised_pixels_are_ready_when_they_have_come() -> None:
    both = Both()
    ours = filled(both.room, 0, FULL)
    files = both.room.hand_over(ours, 2, promised=True)
    theirs = [both.taken(file) for file in files]
    assert all(isinstance(one, PromisedPixels) and not one.is_ready for one in theirs)
    (late,) = both.room.hand_over(ours, promised=True)
    ours.fill(8)
    both.room.settle(files, kept=True)
    assert all(isinstance(one, PromisedPixels) and one.is_ready and int(one.min()) == 8 for one in theirs)
    other = both.taken(late)
    assert isinstance(other, PromisedPixels)
    assert not other.is_ready, "another decoding's word is awaited"
    both.room.settle([late], kept=True)
    both.room.settle(files, kept=False)
    assert other.is_ready
    assert theirs[0].is_ready
    again = both.taken(both.room.hand_over(ours)[0])
    assert not isinstance(again, PromisedPixels)


def test_who_waits_for_pixels_goes_on_when_they_come_or_time_is_up() -> None:
    both = Both()
    ours = filled(both.room, 0, FULL)
    files = both.room.hand_over(ours, promised=True)
    theirs = both.taken(files[0])
    assert isinstance(theirs, PromisedPixels)
    theirs.wait(0.001)
    assert not theirs.is_ready
    timer = threading.Timer(0.05, both.room.settle, (files,), {"kept": True})
    timer.start()
    theirs.wait(600)
    assert theirs.is_ready
    timer.join()


@pytest.mark.parametrize("engine_first", [True, False])
def test_a_place_that_is_still_written_to_is_nobody_elses(engine_first: bool) -> None:
    """The engine lets go of an aborted request while its picture is still being decoded."""
    both = Both()
    ours = filled(both.room, 0, FULL)
    files = both.room.hand_over(ours, promised=True)
    theirs = both.taken(files[0])
    del ours
    if engine_first:
        del theirs
        assert both.room.empty((1,)) is None
        both.room.settle(files, kept=False)
    else:
        both.room.settle(files, kept=False)
        assert not theirs.is_ready  # type: ignore[attr-defined]
        assert both.room.empty((1,)) is None
        del theirs
    assert both.room.empty(FULL) is not None


def test_only_what_will_be_decoded_here_is_promised() -> None:
    both = Both()
    assert both.room.hand_over(np.zeros(SHAPE, np.uint8), promised=True) == []


def test_threads_never_share_a_place() -> None:
    """Whoever has a place finds its own number there, whoever else comes and goes; in the end all of it is free."""
    both = Both(16)
    begin = threading.Barrier(4)

    def work(seed: int) -> int:
        rng = random.Random(seed)
        begin.wait()
        held: list[tuple[int, Pixels]] = []
        seen = 0
        for turn in range(150):
            value = (seed * 64 + turn) % 256
            pixels = both.room.empty((1, rng.randint(1, 400), 512, 3))
            if pixels is not None:
                pixels.fill(value)
                held.append((value, both.taken(both.room.hand_over(pixels)[0]) if rng.random() < 0.7 else pixels))
                seen += 1
            if held and (pixels is None or rng.random() < 0.6):
                value, array = held.pop(rng.randrange(len(held)))
                assert int(array.min()) == int(array.max()) == value
        return seen

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(work, range(4))) > 100
    assert both.room.empty((16 * PIECE_BYTES,)) is not None


def test_a_store_uses_its_room_and_files_where_that_is_full(tmp_path: Path) -> None:
    both = Both()
    store = PixelStore([tmp_path])
    assert store.empty(SHAPE) is None
    store.room = both.room
    pixels = store.empty(SHAPE)
    assert pixels is not None
    pixels.fill(4)
    files = store.write(pixels, copies=2)
    assert [np.array_equal(both.taken(file), pixels) for file in files] == [True, True]
    large = np.ones((2, *FULL[1:]), np.uint8)
    (file,) = store.write(large)
    assert file.ticket == OWN_FILE
    assert np.array_equal(both.taken(file), large)
    del pixels
    (unheard,) = store.write(np.ones(FULL, np.uint8))
    assert store.empty((1,)) is None
    store.discard([unheard, PixelFile("/an/earlier/room", SHAPE, ROOM_HEAD, unheard.ticket)])
    assert store.empty((1,)) is not None


def test_a_room_is_made_where_much_memory_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvl.backends.room.available_host_memory", lambda: 8 * PIECE_BYTES)
    room = make_room(PIECE_BYTES)
    assert room is not None
    assert Path(room.announcement.path).stat().st_size == room.announcement.num_bytes
    del room
    assert make_room(PIECE_BYTES + 1) is None
    assert make_room(0) is None
    monkeypatch.delattr("os.memfd_create")
    assert make_room(PIECE_BYTES) is None


def test_a_room_that_nobody_has_any_more_leaves_no_file_open() -> None:
    both = Both()
    path, pixels = Path(both.room.announcement.path), filled(both.room, 7)
    assert path.exists()
    del both
    assert not path.exists()
    assert int(pixels.min()) == 7, "its memory lasts as long as it is needed"
