"""What this process may take is something, and not more than the machine has; what it has freed is not kept."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from qvl.engine.host_memory import GIVE_BACK_SECONDS, FreedMemory, available_host_memory
from tests.engine.harness import Ask, greedy, make_engine, run, words

# Pieces of the heap that are freed, between small ones that live on: the C library keeps all pages.
PIECES = """
from pathlib import Path
from qvl.engine.host_memory import FreedMemory

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmRSS")) >> 10

freed = FreedMemory(now=iter([0.0, 1e9, 1e9]).__next__)
pieces, lasting = [], []
for _ in range(1000):
    pieces.append(b"x" * 100_000)
    lasting.append(b"y" * 1_000)
del pieces
print(resident(), freed.give_back(), resident())
"""


# Four pieces of 24 MiB at a time, freed together: left alone, the C library gives their 24,576 pages back.
AGAIN = """
import ctypes, resource
from qvl.engine.host_memory import FreedMemory

def fill():
    pieces = [malloc(SIZE) for _ in range(4)]
    for piece in pieces:
        ctypes.memset(piece, 1, SIZE)
    for piece in pieces:
        free(piece)

SIZE = 24 << 20
library = ctypes.CDLL(None)
malloc, free = library.malloc, library.free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
kept = FreedMemory()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_host_memory_is_what_is_left() -> None:
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert 0 < available_host_memory() < total * 1024


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_pages_between_pieces_that_live_on_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True)
    before, given, after = done.stdout.split()
    assert given == "True"
    assert int(before) - int(after) > 50, done.stdout  # of 95 MiB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_large_pieces_are_kept_until_then() -> None:
    done = subprocess.run([sys.executable, "-c", AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 24_576, done.stdout  # of 245,760


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_they_are_given_back_now_and_then() -> None:
    times = [0.0, GIVE_BACK_SECONDS - 1, GIVE_BACK_SECONDS, GIVE_BACK_SECONDS, 2 * GIVE_BACK_SECONDS - 1]
    freed = FreedMemory(now=iter(times).__next__)
    assert [freed.give_back() for _ in range(3)] == [False, True, False]


def test_an_engine_on_a_cpu_gives_back_while_it_serves(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[FreedMemory] = []
    monkeypatch.setattr(FreedMemory, "give_back", lambda self: asked.append(self))
    engine = make_engine(checkpoint)
    run(engine, [Ask([words(1, 5)], greedy(3))])
    assert len(asked) >= 3
