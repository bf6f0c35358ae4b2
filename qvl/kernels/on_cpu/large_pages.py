"""Large pages for the weights of a CPU.

A product of one row reads a matrix once, from its first byte to its last, and with pages of 4 KiB it waits for the
table of pages as well as for memory. Knows what Linux calls them. Does not know what is stored.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

from torch import Tensor

LARGE = 2 << 20
WANTED = 14  # MADV_HUGEPAGE


def in_large_pages(memory: Tensor) -> Tensor:
    """The same tensor: what of its memory is still untouched comes in large pages where the system grants them.

    Nothing happens on other devices and systems, and to tensors too small to gain by it.
    """
    size = memory.numel() * memory.element_size()
    if memory.device.type == "cpu" and size >= 2 * LARGE and (advise := _advise()) is not None:
        first = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, (memory.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE, WANTED)
    return memory


@functools.cache
def _advise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
