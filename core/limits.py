"""What a machine cannot do, found before hours of work: memory, disks, files and folders to write.

Bounds are from below: what passes may still be too much.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from core.errors import ConfigError


def host_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(flag: str, count: int, bytes_each: int, device: torch.device) -> None:
    """Refuse `count` things at once that need more memory than the device has.

    Args:
        flag: that says how many, for the message.
        count: of things.
        bytes_each: that each of them needs at least.
        device: where they lie.

    Raises:
        ConfigError: naming both numbers.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = host_memory()
    if count * bytes_each > memory:
        most = memory // bytes_each
        raise ConfigError(
            f"{flag}: {count} need at least {_giga(count * bytes_each)} of memory, the "
            f"{'GPU' if device.type == 'cuda' else 'machine'} has {_giga(memory)}; at most {most} "
            "can be tried"
        )


def check_disk(flag: str, count: int, bytes_each: int, folder: Path) -> None:
    """Refuse to write `count` things of `bytes_each` where less is free.

    Raises:
        ConfigError: naming both numbers.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if count * bytes_each > free:
        raise ConfigError(
            f"{flag}: {count} need at least {_giga(count * bytes_each)} on the disk of {folder}, "
            f"{_giga(free)} are free"
        )


SHARED_MEMORY = Path("/dev/shm")
"""Where batches of loader processes travel."""
PREFETCHED = 2
"""Batches that each of torch's loader processes reads ahead."""


def check_shared_memory(flag: str, workers: int, bytes_each: int) -> None:
    """Refuse loader processes whose batches do not fit into the memory that processes share.

    Containers have 64 MB of it by default, and a process that finds it full dies of a bus error.

    Args:
        flag: that says how many, for the message.
        workers: processes, each of which reads `PREFETCHED` batches ahead.
        bytes_each: of a batch.

    Raises:
        ConfigError: naming both numbers.
    """
    if not workers or not SHARED_MEMORY.is_dir():
        return
    wanted, free = workers * PREFETCHED * bytes_each, shutil.disk_usage(SHARED_MEMORY).free
    if wanted > free:
        most = free // (PREFETCHED * bytes_each)
        raise ConfigError(
            f"{flag}: batches of {workers} reading process(es) need {_giga(wanted)} of shared "
            f"memory, {SHARED_MEMORY} has {_giga(free)}; allowed: at most {most}, or more of it "
            "(docker run --shm-size 8g)"
        )


def check_out_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that is something else, or cannot be made or written to, by trying it.

    Raises:
        ConfigError: naming flag and path.
    """
    place = _existing(folder)
    if not place.is_dir():
        raise ConfigError(f"{flag}: {place} is a file, not a folder")
    try:  # what permissions say is not all: file systems are read-only or full
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x")
    except OSError as error:
        raise ConfigError(f"{flag}: cannot write to {place}: {error.strerror}") from error


def check_out_file(flag: str, path: Path) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ConfigError: naming flag and path.
    """
    if path.is_dir():
        raise ConfigError(f"{flag}: {path} is a folder; name a file")
    if not path.absolute().parent.exists():
        raise ConfigError(f"{flag}: no folder {path.parent} to write {path.name} to")
    check_out_folder(flag, path.absolute().parent)


def check_new_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that is there already with something in it, or cannot be made.

    Raises:
        ConfigError: naming flag and path.
    """
    check_out_folder(flag, folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{flag}: {folder} exists; remove it or choose another folder")


def _existing(path: Path) -> Path:
    """`path`, or what there is above it."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _giga(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
