"""Encodes a folder of images into a cache of latents, over any number of processes.

The unit of work is a shard: a fixed block of consecutive images. A process takes every n-th shard
as a whole, and no batch crosses a shard's border, so the bytes do not depend on how many
processes there are.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core.distributed import Processes
from core.errors import UserError
from core.files import complete_file
from core.logging import get_logger, progress
from data.images import CROP_RULE, ImageFolder, load_image, to_float
from data.latents import MANIFEST, Manifest, Shard, shard_names
from data.vae import VAE


@dataclass(frozen=True)
class CacheOptions:
    """What to cache and how.

    Attributes:
        data_path: image folder, one folder per class.
        cached_path: folder to write.
        vae_path: hub id or folder of the VAE.
        image_size: side of the cropped images, in pixels.
        batch_size: images per forward pass.
        num_workers: processes that read images, for each encoding process.
        dtype: of the stored moments, one of `data.latents.DTYPES`.
        shard_size: images per pair of files.
        overwrite: replace a finished cache.
    """

    data_path: str
    cached_path: str
    vae_path: str
    image_size: int
    batch_size: int
    num_workers: int
    dtype: str
    shard_size: int
    overwrite: bool


def cache_latents(options: CacheOptions, processes: Processes) -> None:
    """Write the cache; every process calls this.

    Raises:
        UserError: bad folder, VAE or image size, an unreadable image, a finished cache without
            `overwrite`, or values beyond the range of `dtype`.
    """
    out = Path(options.cached_path)
    if (out / MANIFEST).exists() and not options.overwrite:
        raise UserError(f"cached_path: {out} is a finished cache; --overwrite replaces it")
    folder = ImageFolder(options.data_path)
    with processes.main_first():
        vae = VAE(options.vae_path, processes.device)
        if options.image_size % vae.factor:
            raise UserError(
                f"img_size: {options.image_size} is not a multiple of the VAE's {vae.factor}"
            )
        if processes.is_main:
            _prepare(out)
    shards = [
        range(first, min(first + options.shard_size, len(folder)))
        for first in range(0, len(folder), options.shard_size)
    ]
    start = time.perf_counter()
    _encode_shards(options, processes, vae, folder, shards)
    processes.barrier()
    if processes.is_main:
        seconds = time.perf_counter() - start
        _describe(options, vae, folder, shards).write(out)
        get_logger("data.caching").info(
            "%s: %d images of %d classes in %d shards, %.1f images/s",
            *(out, len(folder), len(folder.class_names), len(shards), len(folder) / seconds),
        )


def _prepare(out: Path) -> None:
    """Make the folder; what an older cache or an interrupted run left in it goes."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The manifest goes first: without it the rest is no cache.
        (out / MANIFEST).unlink(missing_ok=True)
        for pattern in ("moments-*.npy", "labels-*.npy", ".*.npy.tmp-*"):
            for file in out.glob(pattern):
                file.unlink()
    except OSError as error:
        raise UserError(f"cached_path: cannot write to {out}: {error}") from error


class _Batches(Dataset):
    """Batches of images; an unreadable one arrives as its error.

    A worker's exception would reach the main process as a traceback in the message's place.
    """

    def __init__(self, folder: ImageFolder, size: int):
        self.folder = folder
        self.size = size

    def __getitems__(self, indices: list[int]) -> Tensor | UserError:
        """Images (B, 3, size, size) uint8, or what is wrong with one of them."""
        try:
            return torch.stack([load_image(self.folder.paths[i], self.size) for i in indices])
        except UserError as error:
            return error


def _as_it_is(batch: Tensor | UserError) -> Tensor | UserError:
    return batch


def _encode_shards(
    options: CacheOptions,
    processes: Processes,
    vae: VAE,
    folder: ImageFolder,
    shards: list[range],
) -> None:
    """Encode and write the shards of this process."""
    numbers = range(processes.rank, len(shards), processes.world_size)
    size = options.batch_size
    batches = {
        number: [
            list(shards[number][first : first + size])
            for first in range(0, len(shards[number]), size)
        ]
        for number in numbers
    }
    loader = DataLoader(
        _Batches(folder, options.image_size),
        batch_sampler=[batch for number in numbers for batch in batches[number]],
        num_workers=options.num_workers,
        collate_fn=_as_it_is,
        pin_memory=processes.device.type == "cuda",
    )
    arriving = iter(loader)
    total = sum(len(shards[number]) for number in numbers)
    with progress(None, processes, "encoding", "img", total=total) as bar:
        for number in numbers:
            parts = []
            for _ in batches[number]:
                parts.append(_encode(vae, next(arriving), options.dtype))
                bar.update(len(parts[-1]))
            labels = folder.labels[shards[number].start : shards[number].stop]
            _write_shard(Path(options.cached_path), number, np.concatenate(parts), labels)


def _encode(vae: VAE, batch: Tensor | UserError, dtype: str) -> np.ndarray:
    """Moments (B, 2, 2C, h, w) of images (B, 3, H, W) and their mirror images."""
    if isinstance(batch, UserError):
        raise batch
    images = to_float(batch.to(vae.device, non_blocking=True))
    views = [vae.encode_moments(images), vae.encode_moments(images.flip(-1))]
    moments = torch.stack(views, dim=1).to(getattr(torch, dtype))
    if not torch.isfinite(moments).all():
        raise UserError(f"dtype: the VAE's moments do not fit {dtype}; try --dtype float32")
    return moments.cpu().numpy()


def _write_shard(out: Path, number: int, moments: np.ndarray, labels: np.ndarray) -> None:
    for name, values in zip(shard_names(number), (moments, labels), strict=True):
        with complete_file(out / name) as path, path.open("wb") as file:
            np.save(file, values)


def _describe(
    options: CacheOptions, vae: VAE, folder: ImageFolder, shards: list[range]
) -> Manifest:
    """The manifest of the files that all processes have written."""
    out = Path(options.cached_path)
    side = options.image_size // vae.factor

    def files() -> Iterator[Shard]:
        for number, block in enumerate(shards):
            names = shard_names(number)
            yield Shard(*names, len(block), *((out / name).stat().st_size for name in names))

    return Manifest(
        vae_path=vae.path,
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        image_size=options.image_size,
        crop=CROP_RULE,
        latent_shape=(vae.latent_channels, side, side),
        dtype=options.dtype,
        class_names=folder.class_names,
        count=len(folder),
        shards=list(files()),
    )
