"""Writing `.npz` archives piece by piece."""

import zipfile
from pathlib import Path

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
