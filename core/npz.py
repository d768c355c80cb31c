"""Writing and reading `.npz` archives piece by piece."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np


class NpzWriter:
    """An uncompressed `.npz` whose arrays are appended in pieces along their first axis."""

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self.entry = None

    def begin(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        """Start the array `name` of the given total shape."""
        self._end()
        self.entry = self.archive.open(f"{name}.npy", "w", force_zip64=True)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self.entry, header)

    def append(self, rows: np.ndarray) -> None:
        """The next rows of the array."""
        self.entry.write(np.ascontiguousarray(rows).data)

    def _end(self) -> None:
        if self.entry is not None:
            self.entry.close()
            self.entry = None

    def __enter__(self) -> "NpzWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()
        self.archive.close()


class NpzReader:
    """An `.npz` whose arrays are read when they are asked for, in pieces if wanted.

    Attributes:
        names: of the arrays.

    Raises:
        OSError, zipfile.BadZipFile: no such file, or no archive.
    """

    def __init__(self, path: Path):
        self.archive = zipfile.ZipFile(path)
        entries = self.archive.namelist()
        self.names = {name.removesuffix(".npy") for name in entries if name.endswith(".npy")}

    def describe(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and dtype of an array."""
        with self.archive.open(f"{name}.npy") as entry:
            shape, _, dtype = _header(entry)
        return shape, dtype

    def read(self, name: str) -> np.ndarray:
        """A whole array."""
        with self.archive.open(f"{name}.npy") as entry:
            return np.lib.format.read_array(entry, allow_pickle=False)

    def rows(self, name: str, size: int) -> Iterator[np.ndarray]:
        """An array in pieces of `size` rows; the last may be shorter."""
        with self.archive.open(f"{name}.npy") as entry:
            shape, fortran, dtype = _header(entry)
            if fortran or dtype.hasobject:
                raise ValueError(f"{name} is stored by columns or holds objects")
            row = dtype.itemsize * int(np.prod(shape[1:]))
            for first in range(0, shape[0], size):
                count = min(size, shape[0] - first)
                content = entry.read(count * row)
                if len(content) != count * row:
                    raise ValueError(f"{name} ends early")
                yield np.frombuffer(bytearray(content), dtype).reshape(count, *shape[1:])

    def __enter__(self) -> "NpzReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.archive.close()


def _header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(entry)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(entry)
    return np.lib.format.read_array_header_2_0(entry)
