"""The cache of VAE latents: its contract, the reader, and the dataset that draws from it.

A cache is a folder with `manifest.json` and numbered pairs of .npy files:

    moments-00000.npy   (n, 2, 2C, h, w) float16 or float32
    labels-00000.npy    (n,) int64

The second axis holds the two views of an image, as it is and mirrored (encoded from the mirrored
image); 2C are the C channels of the posterior's mean, then the C of its log-variance, neither
shifted nor scaled. The manifest is written last: a folder without it is not a cache.
`data.caching` writes, this file reads.

Shapes: B batch, C latent channels, h and w height and width of the latent.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config.schema import DataConfig, ModelConfig
from core.errors import UserError
from core.files import complete_file
from core.rng import generator

VERSION = 1
VIEWS = 2
DTYPES = ("float16", "float32")
MANIFEST = "manifest.json"
MAX_OPEN_SHARDS = 256
"""Every mapped file holds a file descriptor, and 1024 of them is a usual limit."""


@dataclass(frozen=True)
class Shard:
    """A pair of files: `count` images, sizes in bytes."""

    moments: str
    labels: str
    count: int
    moments_bytes: int
    labels_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What the numbers of a cache are.

    Attributes:
        vae_path: hub id or folder of the VAE.
        scaling_factor: a model sees (z - shift_factor) * scaling_factor.
        shift_factor: see there.
        image_size: side of the cropped images, in pixels.
        crop: name of the crop rule.
        latent_shape: [C, h, w].
        dtype: of the moments, one of DTYPES.
        class_names: name of each label.
        count: images.
        shards: files, in the order of the images.
        version: of this contract.
    """

    vae_path: str
    scaling_factor: float
    shift_factor: float
    image_size: int
    crop: str
    latent_shape: tuple[int, int, int]
    dtype: str
    class_names: list[str]
    count: int = 0
    shards: list[Shard] = field(default_factory=list)
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json, which turns `folder` into a cache."""
        with complete_file(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def shard_names(number: int) -> tuple[str, str]:
    """File names of the moments and of the labels of one shard."""
    return f"moments-{number:05d}.npy", f"labels-{number:05d}.npy"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache.

    Raises:
        UserError: there is none, it is damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"cached_path: {folder} is not a finished cache ({MANIFEST} is missing); "
            "make it with main_cache.py"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cached_path: cannot read {path}: {error}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"cached_path: {path} has version {version!r}, this code reads {VERSION}; "
            "make the cache again with main_cache.py"
        )
    try:
        shards = [Shard(**shard) for shard in values.pop("shards")]
        return Manifest(**values, shards=shards)
    except (KeyError, TypeError) as error:
        raise UserError(f"cached_path: {path} is damaged: {error}") from error


class LatentCache:
    """Reader of a cache; moments stay on disk, memory-mapped.

    Copies that travel to other processes open the files for themselves.

    Args:
        path: the cache's folder.

    Attributes:
        manifest: what the numbers are.

    Raises:
        UserError: not a finished cache, another version, or a file is missing or truncated.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        for shard in self.manifest.shards:
            self._check_size(shard.moments, shard.moments_bytes)
            self._check_size(shard.labels, shard.labels_bytes)
        self._ends = np.cumsum([shard.count for shard in self.manifest.shards])
        self._labels: Tensor | None = None
        self._maps: dict[int, np.ndarray] = {}

    def _check_size(self, name: str, expected: int) -> None:
        file = self.path / name
        if not file.is_file():
            raise UserError(f"cached_path: {file} is missing; make the cache again")
        size = file.stat().st_size
        if size != expected:
            raise UserError(
                f"cached_path: {file} has {size} bytes, the manifest says {expected}; "
                "make the cache again"
            )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_maps": {}, "_labels": None}

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def num_classes(self) -> int:
        """Labels are 0 ... num_classes - 1."""
        return len(self.manifest.class_names)

    @property
    def class_names(self) -> list[str]:
        """Name of each label."""
        return self.manifest.class_names

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return tuple(self.manifest.latent_shape)

    @property
    def image_size(self) -> int:
        """Side of the cached images, in pixels."""
        return self.manifest.image_size

    @property
    def scaling_factor(self) -> float:
        """Of the VAE that made the cache."""
        return self.manifest.scaling_factor

    @property
    def shift_factor(self) -> float:
        """Of the VAE that made the cache."""
        return self.manifest.shift_factor

    @property
    def vae_path(self) -> str:
        """Hub id or folder of the VAE that made the cache."""
        return self.manifest.vae_path

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Posterior moments (B, 2C, h, w) float32 of images `indices`, each in view 0 or 1."""
        channels, height, width = self.latent_shape
        out = np.empty((len(indices), 2 * channels, height, width), dtype=np.float32)
        shards = np.searchsorted(self._ends, indices, side="right")
        for row, (shard, index, view) in enumerate(zip(shards, indices, views, strict=True)):
            first = self._ends[shard] - self.manifest.shards[shard].count
            out[row] = self._map(int(shard))[index - first, view]
        return torch.from_numpy(out)

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            if len(self._maps) >= MAX_OPEN_SHARDS:
                self._maps.clear()
            name = self.path / self.manifest.shards[shard].moments
            self._maps[shard] = np.load(name, mmap_mode="r")
        return self._maps[shard]

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of images `indices`."""
        if self._labels is None:
            parts = [np.load(self.path / shard.labels) for shard in self.manifest.shards]
            self._labels = torch.from_numpy(np.concatenate(parts))
        return self._labels[torch.as_tensor(indices, dtype=torch.int64)]


class LatentDataset(Dataset):
    """Latents as the model sees them, drawn anew from the posterior in every epoch.

    An item is requested as a pair (epoch, index). Which view it takes and its posterior noise
    are functions of (seed, epoch, index) alone.

    Args:
        cache: where the moments are.
        seed: of the draws.
        horizontal_flip: take the mirror image's latent with probability one half.
    """

    def __init__(self, cache: LatentCache, seed: int, horizontal_flip: bool = True):
        self.cache = cache
        self.seed = seed
        self.horizontal_flip = horizontal_flip

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """One latent (C, h, w) and its label, a scalar."""
        latents, labels = self.__getitems__([item])
        return latents[0], labels[0]

    def __getitems__(self, items: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) float32 and labels (B,) int64; PyTorch's batched fetch.

        A loader needs a `collate_fn` that returns this as it is.
        """
        views, noise = [], []
        for epoch, index in items:
            draws = generator(self.seed, "latents", epoch, index)
            # Drawn even when unused, so that the switch leaves the posterior noise alone.
            mirrored = bool(torch.rand((), generator=draws) < 0.5)
            views.append(int(mirrored and self.horizontal_flip))
            noise.append(torch.randn(self.cache.latent_shape, generator=draws))
        indices = [index for _, index in items]
        mean, logvar = self.cache.moments(indices, views).chunk(2, dim=1)
        sample = mean + torch.exp(0.5 * logvar) * torch.stack(noise)
        latents = (sample - self.cache.shift_factor) * self.cache.scaling_factor
        return latents, self.cache.labels(indices)


def check_cache(cache: LatentCache, data: DataConfig, model: ModelConfig) -> None:
    """Refuse a cache that is not the one this run is configured for.

    Raises:
        UserError: image size, latent shape or number of classes differ.
    """
    wanted = (model.in_channels, model.input_size, model.input_size)
    pairs = [
        ("data.image_size", data.image_size, cache.image_size),
        ("model.in_channels and input_size", wanted, cache.latent_shape),
        ("model.num_classes", model.num_classes, cache.num_classes),
    ]
    for name, configured, cached in pairs:
        if configured != cached:
            raise UserError(
                f"{name}: {configured} is configured, but the cache {cache.path} has {cached}; "
                "change the config or data.cached_path"
            )
