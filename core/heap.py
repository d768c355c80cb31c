"""What the C library does with memory that is freed: back to the system, or kept for the next one.

On a CPU a tensor of more than 32 MB is by default memory new to the process, whose pages the system
clears while they are first written. A training step allocates the same sizes again and again.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

MEGA = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of mallopt(3), as glibc numbers them."""

USUAL = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * MEGA, M_TRIM_THRESHOLD: 64 * MEGA}
"""Where glibc arrives by itself, and stops, when large blocks come and go."""
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
"""Take blocks of any size from the heap, and never trim it."""


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
    """Keep freed memory from now on, or give it back as usual; without glibc nothing."""
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        for parameter, value in (KEEPING if keep else USUAL).items():
            library.mallopt(parameter, value)
