"""What is kept: bounded in bytes, made once for all who ask at the same time, a failure for nobody but its maker."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qvl.media.kept import Kept


def never() -> bytes:
    raise AssertionError("made again")


def test_what_is_kept_is_not_made_again():
    kept: Kept[bytes] = Kept(len, 10)
    first = kept.get("a", lambda: b"aaaa")
    assert kept.get("a", never) is first
    assert kept.used_bytes == 4


def test_the_one_used_longest_ago_goes_first():
    kept: Kept[bytes] = Kept(len, 10)
    for key in "ab":
        kept.get(key, lambda: b"1234")
    kept.get("a", never)
    kept.get("c", lambda: b"1234")
    kept.get("a", never)
    kept.get("c", never)
    with pytest.raises(AssertionError):
        kept.get("b", never)


def test_what_is_larger_than_all_room_is_handed_out_and_not_kept():
    kept: Kept[bytes] = Kept(len, 10)
    kept.get("small", lambda: b"1")
    assert kept.get("large", lambda: b"x" * 11) == b"x" * 11
    kept.get("small", never)
    assert kept.used_bytes == 1
    with pytest.raises(AssertionError):
        kept.get("large", never)


def test_the_bytes_never_exceed_the_room():
    rng = random.Random(3)
    kept: Kept[bytes] = Kept(len, 50)
    sizes = [rng.randrange(60) for _ in range(20)]
    for _ in range(2000):
        key = rng.randrange(20)
        assert len(kept.get(key, lambda: b"x" * sizes[key])) == sizes[key]  # noqa: B023  (called at once)
        assert kept.used_bytes == sum(map(len, kept._entries.values())) <= 50


def test_those_who_ask_together_get_one():
    kept: Kept[bytes] = Kept(len, 10)
    begun, go = threading.Event(), threading.Event()
    made = []

    def slow() -> bytes:
        begun.set()
        assert go.wait(120)
        made.append(b"x" * 3)
        return made[-1]

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(kept.get, "a", slow)
        assert begun.wait(120)
        others = [pool.submit(kept.get, "a", slow) for _ in range(3)]
        go.set()
        assert {future.result(120) for future in (first, *others)} == {b"xxx"}
    assert len(made) == 1


def test_a_failure_is_not_shared():
    kept: Kept[bytes] = Kept(len, 10)
    begun, go = threading.Event(), threading.Event()

    def fails() -> bytes:
        begun.set()
        assert go.wait(120)
        raise ValueError("broken")

    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(kept.get, "a", fails)
        assert begun.wait(120)
        good = pool.submit(kept.get, "a", lambda: b"good")
        go.set()
        with pytest.raises(ValueError, match="broken"):
            bad.result(120)
        assert good.result(120) == b"good"
    assert kept.get("a", never) == b"good"
