"""Reading mapped rows at random places without what lies around them."""

import ctypes
import mmap
from functools import cache

import numpy as np

RANDOM, NEEDED = mmap.MADV_RANDOM, mmap.MADV_WILLNEED


@cache
def _advise() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def scatter(rows: np.ndarray) -> None:
    """Tell the system that `rows` of a mapped file are read at random places.

    It reads whole neighbourhoods otherwise, up to megabytes for a row of some kilobytes.
    """
    _tell(rows.ctypes.data, rows.nbytes, RANDOM)


def announce(rows: np.ndarray, places: np.ndarray) -> None:
    """Let the system read rows `places` from the disk, all at once, before they are used."""
    start, size = rows.ctypes.data, rows.strides[0]
    for place in places.tolist():
        _tell(start + place * size, size, NEEDED)


def _tell(start: int, size: int, what: int) -> None:
    """Advice for the pages that hold `size` bytes; where the system takes none, nothing changes."""
    first = start & -mmap.PAGESIZE
    _advise().madvise(first, start + size - first, what)
