"""What the C library does with memory that is freed: back to the system, or kept for the next one.

On a CPU every large tensor is by default memory new to the process, whose pages the system clears
while they are first written. A training step allocates the same sizes again and again.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of mallopt(3), as glibc numbers them."""

GLIBC = {M_TRIM_THRESHOLD: 128 * 1024, M_MMAP_MAX: 65536}
"""What they are by default."""
KEEPING = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}
"""Never trim the heap, and take large blocks from it too."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed for the next allocation, as torch does on GPUs; glibc only.

    The process is then as large as it was at its largest moment.
    """
    keep_freed_memory(True)
    try:
        yield
    finally:
        keep_freed_memory(False)


def keep_freed_memory(keep: bool) -> None:
    """Keep freed memory from now on, or let the C library decide; without glibc nothing."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for parameter, value in (KEEPING if keep else GLIBC).items():
            library.mallopt(parameter, value)
