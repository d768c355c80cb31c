"""Checkpoint folders whose damage is noticed: a manifest holds the size and hash of every file."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from core.errors import UserError
from core.files import file_hash
from core.logging import get_logger, progress
from core.tensors import Written

MANIFEST_FILE = "manifest.json"
LATEST = "latest"
STEP_NAME = re.compile(r"step_\d+")
"""Names of finished checkpoints below `<run>/checkpoints`."""

PAUSES = (1.0, 5.0, 20.0)
"""Seconds before a file that could not be read is tried again."""

T = TypeVar("T")
log: logging.Logger = get_logger("sealed")


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def seal(folder: Path, known: Mapping[str, Written] | None = None) -> None:
    """Write the manifest of all files that lie in `folder`.

    Args:
        folder: of a checkpoint.
        known: files, by their path below the folder, whose hash was taken as they were written.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    entries = {}
    for path in files:
        name = str(path.relative_to(folder))
        written = (known or {}).get(name) or Written(path.stat().st_size, file_hash(path))
        entries[name] = {"bytes": written.bytes, "sha256": written.sha256}
    (folder / MANIFEST_FILE).write_text(json.dumps(entries, indent=2))


def check_seal(folder: Path, only: Iterable[str] | None = None) -> None:
    """Compare files with the manifest.

    Args:
        folder: of a checkpoint.
        only: names of files, or of folders of shards; by default everything.

    Raises:
        DamagedError: naming the first file that is missing, truncated or changed.
        UserError: a file cannot be read, for now at least, which proves nothing.
    """
    path = folder / MANIFEST_FILE
    try:
        entries = json.loads(patiently(path.read_text, path))
        asked = {n: e for n, e in entries.items() if only is None or Path(n).parts[0] in only}
        total = sum(entry["bytes"] for entry in asked.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path}: not readable: {error}") from None
    bar = progress(
        None, None, f"checking {folder.name}", "B", total=total, unit_scale=True, leave=False
    )

    def check(item: tuple[str, dict]) -> None:
        name, entry = item
        _check(folder / name, entry["bytes"], entry["sha256"])
        bar.update(entry["bytes"])

    with bar, ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(check, asked.items()))


def _check(path: Path, size: int, digest: str) -> None:
    def whole() -> None:
        found = path.stat().st_size
        if found != size:  # a file server may know an old one for a while
            raise OSError(f"{found} bytes, {size} were written")

    patiently(whole, path, proof=True)
    hashes = (patiently(lambda: file_hash(path), path) for _ in range(2))
    if all(found != digest for found in hashes):  # once may be the disk's or the network's moment
        raise DamagedError(f"{path}: changed since it was written")


def patiently(read: Callable[[], T], path: Path, proof: bool = False) -> T:
    """What `read` gives, tried several times.

    Args:
        read: of a file.
        path: of it.
        proof: its errors without a number are proofs of damage, in words.

    Raises:
        DamagedError: there is still no such file, or damage is proven.
        UserError: it still cannot be read.
    """
    reason, damaged = "", False
    for pause in (*PAUSES, 0.0):
        try:
            return read()
        except (OSError, UserError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            missing = isinstance(cause, FileNotFoundError)
            damaged = missing or (proof and cause.errno is None)
            reason = "missing" if missing else cause.strerror or str(cause)
        if pause:
            log.warning("%s: %s; trying again in %g s", path, reason, pause)
            time.sleep(pause)
    if damaged:
        raise DamagedError(f"{path}: {reason}")
    raise UserError(
        f"{path}: cannot be read: {reason}; nothing was changed, try again when the disk answers"
    )


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders of a run, the newest first; none is looked into."""
    found = (run_dir / "checkpoints").glob("step_*")
    named = [path for path in found if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)


def point_latest(folder: Path) -> None:
    """Let `latest` beside the checkpoint lead to it, in one move."""
    link = folder.with_name(LATEST)
    temporary = folder.with_name(f".{LATEST}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.name)
        os.replace(temporary, link)
    except OSError as error:  # a folder of that name, or a file system without links
        temporary.unlink(missing_ok=True)
        log.warning("%s: stays as it is: %s; %s is whole", link, error.strerror, folder)


def remove_old(run_dir: Path, keep_last: int, keep_every: int) -> None:
    """Keep the newest `keep_last` checkpoints, 0 for all, and those of every `keep_every` steps."""
    if keep_last == 0:
        return
    for folder in checkpoints(run_dir)[keep_last:]:
        if keep_every == 0 or int(folder.name[5:]) % keep_every != 0:
            going = folder.with_name(f".{folder.name}.old.tmp")
            try:
                shutil.rmtree(going, ignore_errors=True)
                os.replace(folder, going)  # never half a checkpoint under its name
                shutil.rmtree(going)
            except OSError as error:  # somebody reads it: the next start sweeps
                log.warning("%s: not removed: %s", folder, error.strerror or error)
