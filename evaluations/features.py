"""From images to features: the extractors by name, and where samples come from.

Feature files are `.npz` with the arrays of an extractor, a row for each image, and `labels` where
the classes are known.

Shapes: N images, H and W of an image, D features.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError, unknown_name
from core.files import file_hash
from core.logging import progress
from core.npz import NpzReader
from core.precision import exact_float32
from data.images import SUFFIXES
from evaluations.digit_classifier import SIZE, load_classifier, to_float
from evaluations.inception import SHA256, WIDTHS, load_inception

ALONE = Processes(0, 1, torch.device("cpu"))


class Extractor(Protocol):
    """A network whose features are compared.

    Attributes:
        name: one of EXTRACTORS.
        weights_hash: SHA-256 of its weight file.
    """

    name: str
    weights_hash: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """`pool` (N, D), `logits` (N, K), and perhaps `spatial`, of images (N, H, W, 3) uint8."""
        ...


@dataclass(frozen=True)
class Network:
    """An extractor before its weights are read.

    Attributes:
        name: one of EXTRACTORS.
        weights_hash: SHA-256 of its weight file.
        widths: D of each kind of features.
        side: of the images that it takes; None for any.
    """

    name: str
    weights_hash: str
    widths: dict[str, int]
    side: int | None = None

    @property
    def about(self) -> dict[str, str]:
        """What files of its features carry."""
        return {"features": self.name, "features_sha256": self.weights_hash}


def network_of(name: str, weights: Path | None, sha256: str | None) -> Network:
    """What `build_extractor` would give.

    Raises:
        UserError: no classifier of digits.
    """
    if name == "inception":
        return Network(name, (sha256 or SHA256).lower(), WIDTHS)
    digits = DigitFeatures(weights, None, torch.device("cpu"))  # a small file
    classes = len(digits.network.class_names)
    widths = {"pool": digits.network.feature_width, "logits": classes}
    return Network(name, digits.weights_hash, widths, SIZE)


class InceptionFeatures:
    """`evaluations.inception.Inception`, in float32 whatever the process allows elsewhere."""

    name = "inception"

    def __init__(self, weights: Path | None, sha256: str | None, device: torch.device):
        self.weights_hash = (sha256 or SHA256).lower()
        self.device = device
        self.network = load_inception(weights, self.weights_hash, device)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        with exact_float32():
            return self.network(images.to(self.device))


class DigitFeatures:
    """The quickstart's digit classifier, for images of 32 pixels."""

    name = "digits"

    def __init__(self, weights: Path | None, sha256: str | None, device: torch.device):
        if weights is None:
            raise UserError(
                "features: digits needs --classifier FILE, by `python -m evaluations.digits`"
            )
        self.weights_hash = file_hash(weights) if weights.is_file() else ""
        self.device = device
        self.network = load_classifier(weights).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        if tuple(images.shape[1:3]) != (SIZE, SIZE):
            raise UserError(
                f"features: digits needs images of {SIZE} x {SIZE}, got {tuple(images.shape[1:3])}"
            )
        pool, logits = self.network(to_float(images.to(self.device)))
        return {"pool": pool, "logits": logits}


EXTRACTORS = {"inception": InceptionFeatures, "digits": DigitFeatures}


def build_extractor(
    name: str, weights: Path | None, sha256: str | None, device: torch.device
) -> Extractor:
    """The extractor `name`, its weights from a file.

    Raises:
        UserError: an unknown name, or weights that cannot be used.
    """
    if name not in EXTRACTORS:
        raise unknown_name("features", name, EXTRACTORS)
    return EXTRACTORS[name](weights, sha256, device)


@dataclass
class Samples:
    """Features of a set of images.

    Attributes:
        features: float32 arrays by name, a row for each image.
        labels: (N,) int64, where they are known.
    """

    features: dict[str, np.ndarray]
    labels: np.ndarray | None = None


def read_samples(path: Path, extractor: Extractor, batch_size: int = 64) -> Samples:
    """Features of a feature file, of the images in an `.npz`, or of a folder of images.

    Args:
        path: `.npz` with `pool` (and `spatial`, `logits`) or `arr_0` (N, H, W, 3) uint8, or a
            folder of images of one size, at any depth.
        extractor: of images; not called for a feature file.
        batch_size: images at a time.

    Raises:
        UserError: nothing of the kind, or images of several sizes.
    """
    if path.is_dir():
        return Samples(extract(extractor, *_folder(path, batch_size)))
    with open_npz(path) as file:
        labels = file.read("labels") if "labels" in file.names else None
        if "pool" in file.names:
            features = {n: file.read(n) for n in ("pool", "spatial", "logits") if n in file.names}
            return Samples(features, labels)
        return Samples(extract(extractor, *image_batches(file, path, batch_size)), labels)


def extract(
    extractor: Extractor, batches: Iterator[np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """Features of `count` images that come in batches (N, H, W, 3) uint8."""
    parts: dict[str, list[np.ndarray]] = {}
    with progress(None, ALONE, f"{extractor.name} features", "img", total=count) as bar:
        for images in batches:
            for name, values in extractor(torch.from_numpy(images)).items():
                parts.setdefault(name, []).append(values.float().cpu().numpy())
            bar.update(len(images))
    return {name: np.concatenate(values) for name, values in parts.items()}


@contextmanager
def open_npz(path: Path) -> Iterator[NpzReader]:
    """The arrays of a file, read when they are asked for.

    Raises:
        UserError: no such file, no `.npz`, or damage that is met while it is read.
    """
    try:
        with NpzReader(path) as file:
            yield file
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: no readable .npz file: {error}") from error


def image_batches(file: NpzReader, path: Path, size: int) -> tuple[Iterator[np.ndarray], int]:
    """`arr_0` of an open file in batches of `size`, and how many images it has.

    Raises:
        UserError: there is none, or it holds no images.
    """
    if "arr_0" not in file.names:
        raise UserError(f"{path}: has no arr_0 and no pool, but {', '.join(sorted(file.names))}")
    shape, dtype = file.describe("arr_0")
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or shape[0] == 0:
        raise UserError(f"{path}: arr_0 must be uint8 (N, H, W, 3), got {dtype} {shape}")
    return file.rows("arr_0", size), shape[0]


def image_files(path: Path) -> list[Path]:
    """The images of a folder, at any depth.

    Raises:
        UserError: there are none.
    """
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{path}: no images in it ({', '.join(SUFFIXES)})")
    return files


def read_image(path: Path) -> np.ndarray:
    """An image (H, W, 3) uint8.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise UserError(f"{path}: cannot be read: {error}") from error


def _folder(path: Path, size: int) -> tuple[Iterator[np.ndarray], int]:
    files = image_files(path)

    def batches() -> Iterator[np.ndarray]:
        first = None
        for start in range(0, len(files), size):
            images = []
            for file in files[start : start + size]:
                images.append(read_image(file))
                first = images[-1].shape if first is None else first
                if images[-1].shape != first:
                    raise UserError(f"{file}: {images[-1].shape}, the images before it {first}")
            yield np.stack(images)

    return batches(), len(files)
