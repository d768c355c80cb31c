"""Reading mapped rows at random places without what lies around them."""

import ctypes
import mmap
import os
from functools import cache

import numpy as np

MOST = 1024
"""Ranges that one call of the system takes."""


def scatter(rows: np.ndarray) -> None:
    """Tell the system that `rows` of a mapped file are read at random places.

    It reads whole neighbourhoods otherwise, up to megabytes for a row of some kilobytes.
    """
    start, size = _pages(np.array([rows.ctypes.data]), rows.nbytes)[0].tolist()
    _system().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_RANDOM)


def announce(rows: np.ndarray, places: np.ndarray) -> None:
    """Let the system read rows `places` from the disk, all at once, before they are used.

    A hint: where the system takes none, reading them is as slow as it would be.

    Args:
        rows: (N, ...) of a mapped file.
        places: (M,) int64.
    """
    size = rows.strides[0]
    ranges = _pages(rows.ctypes.data + places * size, size)
    for first in range(0, len(ranges), MOST):
        part = ranges[first : first + MOST]
        if not _all_at_once(part):
            for start, length in part.tolist():
                _system().madvise(
                    ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_WILLNEED
                )


def _pages(starts: np.ndarray, size: int) -> np.ndarray:
    """(M, 2) uint64 start and length of the whole pages that hold `size` bytes at each start."""
    first = starts & -mmap.PAGESIZE
    return np.stack([first, starts + size - first], axis=1).astype(np.uint64)


def _all_at_once(ranges: np.ndarray) -> bool:
    """Whether the system took them in one call, which costs a seventh of as many calls."""
    system = _system()
    if not hasattr(system, "process_madvise"):
        return False
    vector, count = ctypes.c_void_p(ranges.ctypes.data), ctypes.c_size_t(len(ranges))
    process = _process(os.getpid())
    return system.process_madvise(process, vector, count, mmap.MADV_WILLNEED, 0) > 0


@cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@cache
def _process(pid: int) -> int:
    """A handle of this process, -1 where there is none; a forked one has its own."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
