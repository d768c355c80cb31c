"""Files and folders that appear under their name only when they are complete and on the disk."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError

TEMPORARY = ".*.tmp"
"""Pattern of unfinished files and folders: `.<name>.<process>.tmp`."""


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; rename it to `path` when the block succeeds."""
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        os.chmod(temporary, mode)  # some writers hide what they write from the group
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `path` when the block succeeds.

    Raises:
        UserError: `path` exists with something in it, or cannot be made.
    """
    temporary = begin_folder(path)
    try:
        yield temporary
        finish_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def begin_folder(path: Path) -> Path:
    """The empty folder that `finish_folder` will rename to `path`.

    Raises:
        UserError: `path` exists with something in it, or cannot be made.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"out: {path} exists; remove it or choose another folder")
    temporary = _temporary(path)
    try:
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"out: cannot make {path}: {error.strerror}") from error
    return temporary


def finish_folder(temporary: Path, path: Path) -> None:
    """Let the folder that `begin_folder` gave appear as `path`, once all of it is on the disk."""
    probe = temporary / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for inside in (*temporary.rglob("*"), temporary):
        if inside.is_file():
            os.chmod(inside, mode)
        to_disk(inside)
    os.replace(temporary, path)
    to_disk(path.parent)


def sweep(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder that nobody else writes to."""
    for left in folder.glob(TEMPORARY):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary(path: Path) -> Path:
    """A name beside `path`, on the same file system, that no other process of this host takes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot make {path.parent}: {error.strerror}") from error
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    else:
        temporary.unlink(missing_ok=True)
    return temporary


def to_disk(path: Path) -> None:
    """Wait until a file or a folder's list of names would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
