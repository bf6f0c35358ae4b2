"""The output on disk: answers as they come in OUT.part, all of them in order in OUT at the end.

A row of the part is an output line whose last field is a checksum, so what a crash has torn is known and cut. There is
one writer, held by a lock that ends with the process. Rows reach the operating system one by one, which outlives the
death of this process, and the disk once a second, which outlives the machine's. Does not know what lines say.
"""

from __future__ import annotations

import fcntl
import os
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qvl.batch.ledger import NOWHERE, U64, Ledger
from qvl.batch.lines import ANSWERED, ID_PREFIX, mark_of
from qvl.errors import ConfigError, QvlError

_TAIL = b',"crc":"%08x"}\n'
_TAIL_BYTES = len(_TAIL % 0)
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Recovered:
    """What an earlier run has left: `answered` lines, `failed` ones among them, `torn` rows that are asked again."""

    answered: int = 0
    failed: int = 0
    torn: int = 0


@dataclass(slots=True)
class _Rows:
    """The whole rows of one file, in its order; `end` is behind the last of them. `marks` are pairs."""

    marks: array[int] = field(default_factory=lambda: array("Q"))
    offsets: array[int] = field(default_factory=lambda: array("q"))
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    failed: bytearray = field(default_factory=bytearray)
    torn: int = 0
    end: int = 0

    @classmethod
    def read(cls, path: Path, line_of: Callable[[bytes], bytes | None]) -> _Rows:
        rows = cls()
        offset = 0
        with open(path, "rb") as file:
            for row in file:
                rows._add(line_of(row), offset, len(row))
                offset += len(row)
        return rows

    def _add(self, line: bytes | None, offset: int, length: int) -> None:
        mark = mark_of(line) if line is not None else None
        if line is None or mark is None:
            self.torn += 1
            return
        self.marks.extend((int(mark[:16], 16), int(mark[16:], 16)))
        self.offsets.append(offset)
        self.lengths.append(length)
        self.failed.append(not line.endswith(ANSWERED))
        self.end = offset + length


class Journal:
    """The output of one run, at `path`. Use it as a context manager, or close it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        self._file = -1
        self._end = 0
        self._synced = 0

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raises `ConfigError` where earlier work would be lost, or where nothing could be written."""
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude each other")
        if not self.path.resolve().parent.is_dir():
            raise ConfigError(f"there is no folder {self.path.resolve().parent}")
        if self.path.is_dir():
            raise ConfigError(f"{self.path} is a folder, not a file for answers")
        for path, what in ((self.path, "exists"), (self.part, "holds the answers of an earlier run")):
            if path.exists() and not (resume or overwrite):
                raise ConfigError(f"{path} {what}: --resume goes on with it, --overwrite begins anew")

    def open(self, ledger: Ledger, *, overwrite: bool = False, retry_failed: bool = False) -> Recovered:
        """Takes up what is there and notes it in `ledger`. Raises `ConfigError` when it belongs to other input."""
        self._file = _open_alone(self.part)
        if overwrite:
            os.ftruncate(self._file, 0)
            self.path.unlink(missing_ok=True)
        return self._recover(ledger, retry_failed)

    def append(self, ledger: Ledger, index: int, line: bytes) -> None:
        """One answer; `ledger` knows it then. Raises `QvlError` when it cannot be written."""
        row = line[:-1] + _TAIL % zlib.crc32(line)
        try:
            self._write(row)
        except OSError as error:
            raise QvlError(f"cannot write {self.part}: {error.strerror}; --resume goes on from here") from error
        ledger.answers[index] = self._end - len(row)
        ledger.lengths[index] = len(row)

    def sync(self) -> None:
        """What has been appended is on the disk when this returns. May run in another thread."""
        end = self._end
        if end > self._synced:
            os.fdatasync(self._file)
            self._synced = end

    def finish(self, ledger: Ledger) -> None:
        """Writes the answers of all lines in order to the output, and removes the part."""
        self.sync()
        fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(fresh, "wb", buffering=_COPY_BYTES) as out:
                for offset, length in zip(ledger.answers, ledger.lengths, strict=True):
                    out.write(_line_of(os.pread(self._file, int(length), int(offset))) or self._damaged(int(offset)))
                    out.write(b"\n")
                out.flush()
                os.fsync(out.fileno())
            fresh.replace(self.path)
        except OSError as error:
            raise QvlError(f"cannot write {self.path}: {error.strerror}; --resume tries again") from error
        finally:
            fresh.unlink(missing_ok=True)
        _sync_folder(self.path.resolve().parent)
        self.part.unlink()

    def close(self) -> None:
        """Safe to call twice."""
        if self._file >= 0:
            self.sync()
            if self._end == 0:
                self.part.unlink(missing_ok=True)
            self._forget()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        os.close(self._file)
        self._file = -1

    def _write(self, row: bytes) -> None:
        done = 0
        while done < len(row):
            done += os.pwrite(self._file, row[done:], self._end + done)
        self._end += len(row)

    def _recover(self, ledger: Ledger, retry_failed: bool) -> Recovered:
        """Notes what the part holds, and takes over from a finished output what the part does not have.

        The last row of a line counts. A torn row is left alone, one at the end is cut off.
        """
        rows = _Rows.read(self.part, _line_of)
        if rows.end == 0 and not _may_be_ours(self.part):
            self._forget()
            raise ConfigError(f"{self.part} was not written by qvl batch: --overwrite begins anew")
        os.ftruncate(self._file, rows.end)
        self._end = self._synced = rows.end
        lines = self._lines_of(ledger, rows, self.part)
        failed = np.zeros(len(ledger), bool)
        failed[lines] = np.frombuffer(rows.failed, bool)
        ledger.answers[lines] = np.frombuffer(rows.offsets, np.int64)
        ledger.lengths[lines] = np.frombuffer(rows.lengths, np.uint64)
        if retry_failed:
            ledger.answers[failed] = NOWHERE
        if self.path.exists():
            failed |= self._take_over(ledger, retry_failed)
        failed &= ledger.answers != NOWHERE
        return Recovered(ledger.num_answered, int(np.count_nonzero(failed)), rows.torn)

    def _take_over(self, ledger: Ledger, retry_failed: bool) -> npt.NDArray[np.bool_]:
        """Copies rows of the finished output into the part; which lines' answers there are failures."""
        rows = _Rows.read(self.path, lambda row: row.removesuffix(b"\n"))
        if rows.torn:
            raise ConfigError(f"{self.path} has lines that qvl batch did not write: --overwrite begins anew")
        lines = self._lines_of(ledger, rows, self.path)
        failed = np.zeros(len(ledger), bool)
        with open(self.path, "rb") as finished:
            for line, offset, length, bad in zip(lines.tolist(), rows.offsets, rows.lengths, rows.failed, strict=True):
                if ledger.answers[line] == NOWHERE and not (bad and retry_failed):
                    finished.seek(offset)
                    self.append(ledger, line, finished.read(length).removesuffix(b"\n"))
                    failed[line] = bad
        return failed

    def _lines_of(self, ledger: Ledger, rows: _Rows, path: Path) -> npt.NDArray[np.int64]:
        """Whose answers these are. Raises `ConfigError` for lines that are gone, or say something else now."""
        marks = np.frombuffer(rows.marks, U64).reshape(-1, 2)
        lines = ledger.find(marks[:, 0])
        begin_anew = "--resume needs the same input, --overwrite begins anew"
        if num_gone := int(np.count_nonzero(lines == NOWHERE)):
            raise ConfigError(f"{num_gone} answers in {path} belong to no line of the input: {begin_anew}")
        if len(changed := lines[ledger.contents[lines] != marks[:, 1]]):
            number = ledger.numbers[changed.min()]
            raise ConfigError(f"line {number} of the input has changed since it was answered: {begin_anew}")
        return lines

    def _damaged(self, offset: int) -> bytes:
        raise QvlError(f"{self.part} has been damaged at byte {offset}; --resume asks what is lost again")


def _line_of(row: bytes) -> bytes | None:
    """The output line of a row without its checksum; None when it is not whole."""
    line = row[:-_TAIL_BYTES] + b"}"
    return line if row.startswith(ID_PREFIX) and row.endswith(_TAIL % zlib.crc32(line)) else None


def _open_alone(path: Path) -> int:
    """The file, for this process only. Raises `ConfigError` when it cannot be written, or another one has it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The other one may have finished and removed it just now: then this is a file without a name.
        if path.exists() and path.stat().st_ino == os.fstat(file).st_ino:
            return file
    except OSError:
        pass
    os.close(file)
    raise ConfigError(f"another process is writing {path}")


def _may_be_ours(path: Path) -> bool:
    """Whether a file without one whole row can be what a crash has left: nothing, zeros, or the beginning of a row."""
    with open(path, "rb") as file:
        start = file.read(len(ID_PREFIX)).rstrip(b"\0")
    return ID_PREFIX.startswith(start)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
