"""Which set of samples a file belongs to: two hashes in every file, compared with its record."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.npz import NpzReader, NpzWriter
from sampling.sets import RECORD_FILE, Record, SetFolder, differences, hashes_of, read_json, short


def mark(archive: NpzWriter, hashes: dict[str, str]) -> None:
    """Add to an archive of arrays which set it belongs to."""
    for name, value in hashes.items():
        text = np.array(value)
        archive.begin(name, text.dtype, ())
        archive.append(text)


def marks(path: Path) -> dict[str, str]:
    """What `mark` wrote, and other texts (0-d arrays), of an `.npz` file.

    Raises:
        UserError: the file is not readable.
    """
    try:
        with NpzReader(path) as file:
            shapes = {name: file.describe(name) for name in file.names}
            texts = [n for n, (shape, kind) in shapes.items() if shape == () and kind.kind == "U"]
            return {name: str(file.read(name)) for name in texts}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: no readable .npz file: {error}") from error


def check_file(path: Path, record: Record) -> None:
    """Refuse an `.npz` that does not belong to the record's set.

    Raises:
        UserError: naming both hashes.
    """
    found = marks(path)
    for name, wanted in hashes_of(record).items():
        if found.get(name) != wanted:
            raise UserError(
                f"{path}: belongs to another set: {name} is {short(found.get(name))} there, "
                f"{short(wanted)} in {RECORD_FILE} beside it; sample with --overwrite"
            )


def check_files(folder: SetFolder, record: Record) -> None:
    """`check_file` of all that the set has.

    Raises:
        UserError: naming file and hashes.
    """
    for path in (folder.archive, folder.features, folder.routing):
        if path.exists():
            check_file(path, record)
    if folder.numbers.exists():
        found = read_json(folder.numbers)
        other = differences(found, hashes_of(record))
        if other:
            raise UserError(f"{folder.numbers}: belongs to another set: {other[0]}")
