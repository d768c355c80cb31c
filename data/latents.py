"""Reading caches of VAE latents: whole batches of moments in one call, checked at first read.

Shapes: B batch, C latent channels, h and w height and width of the latent.
"""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.logging import progress
from data.manifest import KINDS, read_manifest, shard_path, stored_dtype
from data.mapped import mapped
from data.readahead import announce, scatter

FIELD = "data.cached_path"


class Moments(Protocol):
    """Posterior moments of numbered images: a cache, several of them, or published files.

    Attributes:
        path: where they are, for messages.
        vae_path: hub id or folder of the VAE that made them.
        vae_hash: of its weights; None where nobody wrote it down.
        scaling_factor: a model sees (z - shift_factor) * scaling_factor.
        shift_factor: see there.
        image_size: side of the images in pixels; None where nobody wrote it down.
        latent_shape: (C, h, w).
        class_names: name of each label.
        shards: (first, last + 1) of images that lie together, for reading in that order.
        views: 2, or 1 where there are no mirrored images.
    """

    path: str
    vae_path: str
    vae_hash: str | None
    scaling_factor: float
    shift_factor: float
    image_size: int | None
    latent_shape: tuple[int, int, int]
    class_names: list[str]
    shards: list[tuple[int, int]]
    views: int

    def __len__(self) -> int: ...

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Posterior moments (B, 2C, h, w) of images `indices`, each in view 0 or 1 (mirrored)."""
        ...

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of images `indices`."""
        ...


class LatentCache:
    """Reader of a cache; the files stay on disk, mapped into memory.

    Nothing is loaded but what is asked for, and the pages that hold it belong to the system, which
    takes them back when it needs them. Every row is compared with its checksum when it is read for
    the first time. Copies that travel to other processes map the files for themselves.

    Args:
        path: the cache's folder; it may be read-only.
        scattered: rows are read at random places in all of it, not shard by shard.

    Attributes:
        manifest: what the numbers are.

    Raises:
        UserError: not a finished cache, another version, or a file is missing or truncated.
    """

    def __init__(self, path: str | Path, scattered: bool = True):
        self.folder = Path(path)
        self.path, self.scattered = str(path), scattered
        self.manifest = manifest = read_manifest(self.folder)
        for shard in manifest.shards:
            shard.check(self.folder)
        self.vae_path, self.vae_hash = manifest.vae_path, manifest.vae_hash
        self.scaling_factor = manifest.scaling_factor
        self.shift_factor = manifest.shift_factor
        self.image_size = manifest.image_size
        self.latent_shape = tuple(manifest.latent_shape)
        self.class_names = manifest.class_names
        self.views = manifest.views
        self._ends = np.cumsum([shard.count for shard in manifest.shards])
        self._open: dict[int, _OpenShard] = {}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return self.manifest.count

    @property
    def shards(self) -> list[tuple[int, int]]:
        """(first, last + 1) of each shard's images."""
        counts = (shard.count for shard in self.manifest.shards)
        return [(int(end) - n, int(end)) for end, n in zip(self._ends, counts, strict=True)]

    def names(self) -> list[str]:
        """Paths of all images below the folder that they came from, in order.

        Raises:
            UserError: naming a file that changed.
        """
        found = []
        for shard in self.manifest.shards:
            shard.check_contents(self.folder, "names")
            path = shard_path(self.folder, "names", shard.number)
            lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
            found += [line.replace("\\n", "\n") for line in lines]
        return found

    def verify(self) -> None:
        """Read every byte and compare with the checksums.

        Raises:
            UserError: naming the first file that changed.
        """
        total = sum(sum(shard.sizes.values()) for shard in self.manifest.shards)
        with progress(None, None, "verifying", "B", total=total, unit_scale=True) as bar:
            for shard in self.manifest.shards:
                for kind in KINDS:
                    shard.check_contents(self.folder, kind)
                    bar.update(shard.sizes[kind])

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Posterior moments (B, 2C, h, w), in the dtype of the cache, of `indices` in `views`.

        Raises:
            UserError: naming a file whose bytes are not what was written; a mirrored view of a
                cache that has none.
        """
        index, view = np.asarray(indices, dtype=np.int64), np.asarray(views, dtype=np.int64)
        if view.max(initial=0) >= self.views:
            raise UserError(
                f"{FIELD}: {self.path} holds no mirrored images; set data.horizontal_flip false, "
                "or make the cache again with --views 2"
            )
        channels, height, width = self.latent_shape
        dtype = self.manifest.dtype
        # numpy, since it copies rows as blocks: three times as fast as torch's index_select.
        out = np.empty((len(index), 2 * channels * height * width), stored_dtype(dtype))
        parts = [
            (self._shard(number), rows, inside * self.views + view[rows])
            for number, rows, inside in self._by_shard(index)
        ]
        for shard, _, places in parts:
            shard.announce(places)
        for shard, rows, places in parts:
            out[rows] = shard.read(places)
        moments = torch.from_numpy(out).view(getattr(torch, dtype))
        return moments.view(-1, 2 * channels, height, width)

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of images `indices`."""
        index = np.asarray(indices, dtype=np.int64)
        out = np.empty(len(index), dtype=np.int64)
        for number, rows, inside in self._by_shard(index):
            out[rows] = self._shard(number).labels[inside]
        return torch.from_numpy(out)

    def _by_shard(self, index: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, places in `index`, places in the shard) for every shard that is touched."""
        shards = np.searchsorted(self._ends, index, side="right")
        order = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[order], return_index=True)
        groups = np.split(order, starts[1:]) if len(numbers) else []
        firsts = self._ends[numbers] - [self.manifest.shards[n].count for n in numbers]
        return [
            (int(number), rows, index[rows] - first)
            for number, rows, first in zip(numbers, groups, firsts, strict=True)
        ]

    def _shard(self, number: int) -> "_OpenShard":
        if number not in self._open:
            self._open[number] = _OpenShard(self, number)
        return self._open[number]


class _OpenShard:
    """The mapped files of one shard.

    Attributes:
        moments: (V n, 2C h w), the V views of an image one after the other.
        labels: (n,).
    """

    def __init__(self, cache: LatentCache, position: int):
        manifest, folder = cache.manifest, cache.folder
        shard, dtype = manifest.shards[position], stored_dtype(manifest.dtype)
        channels, height, width = cache.latent_shape
        for kind in ("labels", "checks"):
            shard.check_contents(folder, kind)
        self.path = shard_path(folder, "moments", shard.number)
        self.views = manifest.views
        shape = (shard.count, self.views, 2 * channels, height, width)
        self.moments = mapped(self.path, shape, dtype, FIELD).reshape(self.views * shard.count, -1)
        labels, checks = (shard_path(folder, kind, shard.number) for kind in ("labels", "checks"))
        self.labels = mapped(labels, (shard.count,), np.dtype(np.int64), FIELD)
        self.checks = mapped(checks, shape[:2], np.dtype(np.uint32), FIELD).ravel()
        self.checked = np.zeros(len(self.checks), dtype=bool)
        self.scattered = cache.scattered
        if self.scattered:
            scatter(self.moments)

    def announce(self, places: np.ndarray) -> None:
        """Rows that are going to be read."""
        if self.scattered:
            announce(self.moments, places)

    def read(self, places: np.ndarray) -> np.ndarray:
        """Rows of `moments`, each compared with its checksum when it is read first."""
        rows = self.moments[places]
        for new in np.flatnonzero(~self.checked[places]):
            place = places[new]
            if zlib.crc32(rows[new]) != self.checks[place]:
                raise UserError(
                    f"data.cached_path: {self.path} changed since it was written, at image "
                    f"{place // self.views} of it; make the cache again"
                )
            self.checked[place] = True
        return rows


class JoinedCaches:
    """Several caches of the same kind, one after the other, as one.

    Args:
        parts: at least one.

    Raises:
        UserError: when VAE, scale, sizes or classes of two parts differ.
    """

    SAME = (
        *("vae_hash", "scaling_factor", "shift_factor", "image_size"),
        *("latent_shape", "class_names"),
    )

    def __init__(self, parts: Sequence[Moments]):
        first, *others = parts
        for other in others:
            for name in self.SAME:
                if getattr(first, name) != getattr(other, name):
                    raise UserError(
                        f"data.cached_path: {first.path} and {other.path} cannot be joined, their "
                        f"{name} differ: {getattr(first, name)} and {getattr(other, name)}"
                    )
        self.parts = list(parts)
        self.path = ", ".join(part.path for part in parts)
        self.vae_path = first.vae_path
        self.views = min(part.views for part in parts)
        for name in self.SAME:
            setattr(self, name, getattr(first, name))
        self._ends = np.cumsum([len(part) for part in parts])
        starts = self._ends - [len(part) for part in parts]
        self.shards = [
            (int(start) + low, int(start) + high)
            for start, part in zip(starts, parts, strict=True)
            for low, high in part.shards
        ]
        self._starts = starts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def moments(self, indices: Sequence[int], views: Sequence[int]) -> Tensor:
        """Moments (B, 2C, h, w) float32 of images `indices` in `views`."""
        index, view = np.asarray(indices), np.asarray(views)
        channels, height, width = self.latent_shape
        out = torch.empty((len(index), 2 * channels, height, width))
        for part, rows, inside in self._by_part(index):
            out[torch.from_numpy(rows)] = part.moments(inside, view[rows]).float()
        return out

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Labels (B,) int64 of images `indices`."""
        index = np.asarray(indices)
        out = torch.empty(len(index), dtype=torch.int64)
        for part, rows, inside in self._by_part(index):
            out[torch.from_numpy(rows)] = part.labels(inside)
        return out

    def _by_part(self, index: np.ndarray) -> list[tuple[Moments, np.ndarray, np.ndarray]]:
        numbers = np.searchsorted(self._ends, index, side="right")
        found = ((n, np.flatnonzero(numbers == n)) for n in np.unique(numbers))
        return [(self.parts[n], rows, index[rows] - self._starts[n]) for n, rows in found]
