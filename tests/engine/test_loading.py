"""Several pictures at a time: in order, bounded, and given up when nobody waits."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from qvl.engine.loading import Loading
from qvl.errors import BadMedia
from qvl.media import fetch
from qvl.media.fetch import MediaPolicy
from qvl.media.given_up import check_wanted, given_up_by, turn


def test_all_at_the_same_time_and_in_order() -> None:
    together = threading.Barrier(5, timeout=120)

    def load(number: int) -> int:
        together.wait()  # nobody passes before all five are here
        time.sleep(0.01 * (5 - number))
        return number

    assert list(Loading().in_order(load, range(5))) == [0, 1, 2, 3, 4]
    assert list(Loading().in_order(load, [])) == []


def test_one_picture_is_loaded_by_the_thread_that_asks() -> None:
    assert list(Loading().in_order(lambda _: threading.get_ident(), [0])) == [threading.get_ident()]


def test_the_first_error_in_order_is_the_one_that_is_told() -> None:
    later_failed = threading.Event()

    def load(number: int) -> int:
        if number == 3:
            later_failed.set()
            raise BadMedia("picture 3")
        if number == 1:
            later_failed.wait(120)
            raise BadMedia("picture 1")
        return number

    with pytest.raises(BadMedia, match="picture 1"):
        list(Loading().in_order(load, range(4)))


def test_the_gate_bounds_who_computes() -> None:
    loading = Loading(cores=2)
    lock, inside, most = threading.Lock(), 0, 0

    def load(_: int) -> None:
        nonlocal inside, most
        with turn(loading.gate):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.01)
            with lock:
                inside -= 1

    list(loading.in_order(load, range(12)))
    assert most == 2


def test_context_goes_along() -> None:
    """What was given up is seen by the other threads of the request too."""
    left = threading.Event()
    left.set()

    def load(_: int) -> str:
        try:
            check_wanted()
        except BadMedia:
            return "given up"
        return "wanted"

    with given_up_by(left):
        assert list(Loading().in_order(load, range(3))) == ["given up"] * 3
    assert list(Loading().in_order(load, range(3))) == ["wanted"] * 3


def test_who_waits_for_a_turn_may_leave() -> None:
    gate = threading.BoundedSemaphore(1)
    gate.acquire()
    left = threading.Event()
    threading.Timer(0.1, left.set).start()
    with given_up_by(left), pytest.raises(BadMedia, match="given up"), turn(gate):
        pass


@contextmanager
def mute_host() -> Iterator[str]:
    """Accepts and never says a word."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        yield f"http://127.0.0.1:{mute.getsockname()[1]}/never.jpg"


def test_a_fetch_that_nobody_waits_for_ends() -> None:
    """Its own time-outs would come after ten minutes."""
    policy = MediaPolicy(allow_private_hosts=True, read_timeout=600, total_timeout=600)
    left = threading.Event()
    ended: list[BadMedia] = []

    def read(url: str) -> None:
        with given_up_by(left):
            try:
                fetch.read(url, policy, expect="image")
            except BadMedia as error:
                ended.append(error)

    with mute_host() as url:
        thread = threading.Thread(target=read, args=(url,), daemon=True)
        thread.start()
        thread.join(0.6)
        assert thread.is_alive(), "nobody has given it up yet"
        left.set()
        thread.join(120)
        assert not thread.is_alive()
    assert "given up" in ended[0].message


def test_time_outs_are_as_long_as_before() -> None:
    policy = MediaPolicy(allow_private_hosts=True, read_timeout=0.6, total_timeout=600)
    started = time.monotonic()
    with mute_host() as url, pytest.raises(BadMedia, match="in time"):
        fetch.read(url, policy, expect="image")
    assert time.monotonic() - started >= 0.6


@pytest.mark.parametrize(
    ("source", "remote"),
    [
        ("http://a/b", True),
        ("HTTPS://a/b", True),
        ("data:image/png;base64,", False),
        ("file:///a", False),
        ("/a/b.png", False),
        (b"http://a/b", False),
        (np.zeros((1, 1, 3), np.uint8), False),
    ],
)
def test_what_is_remote(source: object, remote: bool) -> None:
    assert fetch.is_remote(source) is remote
