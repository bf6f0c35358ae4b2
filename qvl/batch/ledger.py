"""What is kept in memory of every line: forty bytes, so that millions fit.

Knows where a line is, two hashes of it, and where its answer is. Lines and answers themselves stay on disk.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from qvl.batch.lines import read_id, shown_id
from qvl.batch.source import RawLine, Source
from qvl.errors import InvalidRequest

U64: np.dtype[np.uint64] = np.dtype(np.uint64)
NOWHERE = -1


@dataclass(slots=True)
class Ledger:
    """The lines of one input in their order. `keys` are hashes of custom_ids, `contents` of what the lines say.

    `answers` are offsets in the journal, `lengths` of the answers there; an answer at NOWHERE is still to come.
    """

    numbers: npt.NDArray[np.uint64]
    offsets: npt.NDArray[np.uint64]
    keys: npt.NDArray[np.uint64]
    contents: npt.NDArray[np.uint64]
    num_unreadable: int
    answers: npt.NDArray[np.int64] = field(init=False)
    lengths: npt.NDArray[np.uint32] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = np.full(len(self), NOWHERE, np.int64)
        self.lengths = np.zeros(len(self), np.uint32)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def num_answered(self) -> int:
        return int(np.count_nonzero(self.answers != NOWHERE))

    def open_lines(self) -> npt.NDArray[np.int64]:
        """The indices of lines without an answer, in order."""
        return np.flatnonzero(self.answers == NOWHERE)

    def mark(self, index: int) -> bytes:
        """By what an output line names its request: 32 hex digits."""
        return b"%016x%016x" % (int(self.keys[index]), int(self.contents[index]))

    def find(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The index of each key, or NOWHERE."""
        if not len(self):
            return np.full(len(keys), NOWHERE, np.int64)
        order = np.argsort(self.keys, kind="stable")
        places = order[np.minimum(np.searchsorted(self.keys, keys, sorter=order), len(self) - 1)]
        return np.where(self.keys[places] == keys, places, NOWHERE)


def scan(source: Source) -> Ledger:
    """Reads the input once, before anything is asked. Raises `InvalidRequest` for lines with the same custom_id."""
    numbers, offsets, keys, contents = (array("Q") for _ in range(4))
    num_unreadable = 0
    for line in source.scan():
        try:
            custom_id = read_id(line.data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            custom_id, num_unreadable = None, num_unreadable + 1
        numbers.append(line.number)
        offsets.append(line.offset)
        keys.append(hash_of(shown_id(custom_id, line.number).encode("utf-8", "surrogatepass")))
        contents.append(content_of(line))
    columns = [np.frombuffer(column, U64) for column in (numbers, offsets, keys, contents)]
    ledger = Ledger(columns[0], columns[1], columns[2], columns[3], num_unreadable)
    if len(ledger) == 0:
        raise InvalidRequest(f"there is nothing to ask in {source.name}")
    if num_unreadable == len(ledger):
        raise InvalidRequest(f"no line of {source.name} is a request: one JSON object a line is expected")
    _refuse_repeated(source, ledger)
    return ledger


def hash_of(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def content_of(line: RawLine) -> int:
    """A hash of all that decides what is asked."""
    return hash_of(line.data + b"\n" + line.stamp if line.stamp else line.data)


def _refuse_repeated(source: Source, ledger: Ledger) -> None:
    order = np.argsort(ledger.keys, kind="stable")
    ordered = ledger.keys[order]
    again = order[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return
    second = int(again.min())
    first = int(np.flatnonzero(ledger.keys == ledger.keys[second])[0])
    custom_id = _id_at(source, ledger, second) or _id_at(source, ledger, first)
    more = f" ({len(again) - 1} more lines repeat one)" if len(again) > 1 else ""
    raise InvalidRequest(
        f"{source.name}: line {ledger.numbers[second]} repeats the custom_id '{custom_id}' of line "
        f"{ledger.numbers[first]}{more}: answers are told apart by it",
        param="custom_id",
    )


def _id_at(source: Source, ledger: Ledger, index: int) -> str | None:
    try:
        return read_id(source.read(int(ledger.offsets[index])))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
