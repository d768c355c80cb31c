"""References: what samples are compared with.

An `.npz` as ADM's: `mu` and `sigma` of pool_3, `mu_s` and `sigma_s` of the spatial features, and
`arr_0`, images for precision and recall. Whatever is missing is computed from `arr_0` (or from
features `pool` and `spatial`) where they are there.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import UserError
from core.files import file_hash
from evaluations.features import Extractor, extract, image_batches, open_npz
from evaluations.metrics import statistics

PAIRS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""Features and the names of their statistics."""

Described = tuple[tuple[int, ...], np.dtype]
"""Shape and dtype of an array that is not read yet."""


@dataclass
class Reference:
    """What a reference file gives.

    Attributes:
        path: of the file.
        sha256: of the file.
        statistics: mean (D,) and covariance (D, D), float64, by the features' name.
        pool: (N, D), for precision and recall.
    """

    path: Path
    sha256: str
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]
    pool: np.ndarray | None

    def statistics_of(self, features: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of `features`.

        Raises:
            UserError: the file cannot give them, naming metric and arrays.
        """
        if features not in self.statistics:
            names = " and ".join(PAIRS[features])
            raise UserError(f"{metric}: {self.path} has neither {names} nor arr_0")
        return self.statistics[features]

    def pool_of(self, metric: str) -> np.ndarray:
        """Features for precision and recall.

        Raises:
            UserError: the file cannot give them.
        """
        if self.pool is None:
            raise UserError(f"{metric}: {self.path} has no arr_0, images to compare with")
        return self.pool


def read_reference(
    path: Path, extractor: Extractor, batch_size: int = 64, images: bool = True
) -> Reference:
    """A reference from its file.

    Args:
        path: of the `.npz`.
        extractor: of features from its images.
        batch_size: images at a time.
        images: look at `arr_0` even if all statistics are there.

    Raises:
        UserError: no such file, or arrays that do not fit.
    """
    with open_npz(path) as file:
        found = {}
        for features, (mean, covariance) in PAIRS.items():
            if {mean, covariance} <= file.names:
                names = mean, covariance
                check_statistics(path, mean, *map(file.describe, names))
                found[features] = tuple(file.read(name).astype(np.float64) for name in names)
        known = {}
        if "pool" in file.names:
            known = {name: file.read(name) for name in PAIRS if name in file.names}
        elif "arr_0" in file.names and (images or len(found) < len(PAIRS)):
            known = extract(extractor, *image_batches(file, path, batch_size))
        elif not found:
            raise UserError(
                f"{path}: no reference; needs mu and sigma, arr_0 or pool, and has "
                f"{', '.join(sorted(file.names)) or 'nothing'}"
            )
    for features in PAIRS:
        if features in known and features not in found:
            found[features] = statistics(known[features])
    return Reference(path, file_hash(path), found, known.get("pool"))


def check_statistics(path: Path, name: str, mean: Described, covariance: Described) -> None:
    """Refuse arrays that are no mean and covariance, by their shapes and dtypes.

    Args:
        path: of the file.
        name: of the mean.
        mean: its shape and dtype.
        covariance: its shape and dtype.

    Raises:
        UserError: naming file, arrays and what they are.
    """
    size = mean[0]
    fits = len(size) == 1 and covariance[0] == size * 2
    if not fits or {mean[1].kind, covariance[1].kind} != {"f"}:
        raise UserError(
            f"{path}: {name} and its covariance must be floats (D,) and (D, D), got "
            f"{mean[1]} {mean[0]} and {covariance[1]} {covariance[0]}"
        )
