"""Reading safetensors files through a memory map without holding more of them than the piece in hand.

Knows the file format. Does not know models. The library's own reader keeps every page it has touched in the process,
which doubles the memory of a load; this one gives them back.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qvl.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_HEADER = 100 * 1024 * 1024
PIECE = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An open file; `entries` by tensor name.

    Raises CheckpointError for a file that is truncated or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError:
            raise CheckpointError(f"{path.name} is a link to a file that is not there; download it again") from None
        except OSError as error:
            raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None
        except ValueError:  # nothing to map
            raise CheckpointError(f"{path.name} is empty; download it again") from None
        try:
            self.entries = self._read_header()
        except CheckpointError:
            self._map.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._map.close()

    def _read_header(self) -> dict[str, Entry]:
        if self._map[:20] == b"version https://git-":
            raise CheckpointError(f"{self.path.name} is a git-lfs pointer, not the weights; run `git lfs pull`")
        size = int.from_bytes(self._map[:8], "little")
        if not 2 <= size <= MAX_HEADER or len(self._map) < 8 + size:
            raise CheckpointError(f"{self.path.name} is truncated or not a safetensors file; download it again")
        try:
            header = json.loads(self._map[8 : 8 + size])
            header.pop("__metadata__", None)
            return {name: self._entry(name, fields, 8 + size) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"the header of {self.path.name} is damaged; download the file again") from None

    def _entry(self, name: str, fields: dict[str, Any], base: int) -> Entry:
        first, last = (int(offset) for offset in fields["data_offsets"])
        entry = Entry(str(fields["dtype"]), tuple(int(n) for n in fields["shape"]), base + first, base + last)
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and last - first != math.prod(entry.shape) * dtype.itemsize:
            raise CheckpointError(f"{self.path.name}: the size of '{name}' does not fit its shape; the file is damaged")
        if not 0 <= first <= last or entry.stop > len(self._map):
            ends = f"'{name}' ends at byte {entry.stop} of {len(self._map)}"
            raise CheckpointError(f"{self.path.name} is truncated: {ends}; download it again")
        return entry

    def pieces(self, entry: Entry, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(index of the first number, flat piece) over a tensor; a piece is valid until the next one is asked for.

        The length of a piece is a multiple of `multiple` numbers: whole rows, where a reader needs them.
        """
        dtype = DTYPES[entry.dtype]
        unit = multiple * dtype.itemsize
        size = max(1, PIECE // unit) * unit
        for start in range(entry.start, entry.stop, size):
            stop = min(start + size, entry.stop)
            count = (stop - start) // dtype.itemsize
            yield (
                (start - entry.start) // dtype.itemsize,
                torch.frombuffer(self._map, dtype=dtype, count=count, offset=start),
            )
            self._forget(start, stop)

    def _forget(self, start: int, stop: int) -> None:
        """Give the pages back; the kernel reads them again should a neighbour need them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            page = start - start % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, stop - page)
