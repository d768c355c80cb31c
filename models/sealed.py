"""Checkpoint folders whose damage is noticed: a manifest holds the size and hash of every file."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from core.errors import UserError
from core.files import file_hash

MANIFEST_FILE = "manifest.json"
STEP_NAME = re.compile(r"step_\d+")
"""Names of finished checkpoints below `<run>/checkpoints`."""


class DamagedError(UserError):
    """A checkpoint that is not as it was written."""


def seal(folder: Path) -> None:
    """Write the manifest of all files that lie in `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_FILE)
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in files
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(entries, indent=2))


def check_seal(folder: Path, only: Iterable[str] | None = None) -> None:
    """Compare files with the manifest.

    Args:
        folder: of a checkpoint.
        only: names of files, or of folders of shards; by default everything.

    Raises:
        DamagedError: naming the first file that is missing, truncated or changed.
    """
    try:
        entries = json.loads((folder / MANIFEST_FILE).read_text())
        for name, entry in entries.items():
            if only is None or Path(name).parts[0] in only:
                _check(folder / name, entry["bytes"], entry["sha256"])
    except DamagedError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"{folder / MANIFEST_FILE}: not readable: {error}") from None


def _check(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise DamagedError(f"{path}: missing")
    if path.stat().st_size != size:
        raise DamagedError(f"{path}: {path.stat().st_size} bytes, {size} were written")
    if file_hash(path) != digest:
        raise DamagedError(f"{path}: changed since it was written")


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoint folders of a run, the newest first; none is looked into."""
    found = (run_dir / "checkpoints").glob("step_*")
    named = [path for path in found if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)
