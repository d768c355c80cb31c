"""python -m data.convert_cache --from DIR --out OUT --contents KIND --vae_path VAE --img_size N

Write a published cache, one `.npz` for each image, as the cache that train.py reads by default.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from core.command_line import Parser, as_flags, natural, positive
from core.errors import UserError, command
from core.logging import get_logger, progress
from data.making import ALONE, made_alone, refuse_taken
from data.manifest import DTYPES, VIEWS, Manifest, Shard
from data.published import CONTENTS, PublishedCache
from data.vae import VAE
from data.workers import next_of, steady

CROP = "unknown"
"""Nobody wrote down how published files were cropped."""

FLAGS = {
    "data.cached_path": "--from",
    "data.npz_contents": "--contents",
    "data.vae_path": "--vae-path",
    "dtype": "--dtype",
}
"""Keys of a config that have a flag here."""


class _Shards(Dataset):
    """Moments (n, 2, 2C, h, w) of ranges of images; an unreadable file arrives as a message."""

    def __init__(self, source: PublishedCache, ranges: list[range], dtype: str):
        self.source, self.ranges, self.dtype = source, ranges, getattr(torch, dtype)

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> np.ndarray | str:
        indices = self.ranges[number]
        try:
            views = [self.source.moments(indices, [v] * len(indices)) for v in range(VIEWS)]
        except UserError as error:
            return str(error)
        moments = torch.stack(views, dim=1).to(self.dtype)
        if not torch.isfinite(moments).all():
            return f"dtype: moments of {self.source.path} do not fit {self.dtype}"
        bits = moments.view(torch.uint16) if self.dtype == torch.bfloat16 else moments
        return bits.numpy()


def convert_cache(
    source: PublishedCache,
    out: Path,
    image_size: int,
    vae_hash: str,
    dtype: str = "float16",
    shard_size: int = 4096,
    num_workers: int = 0,
    timeout: int = 600,
) -> None:
    """Write `source` as a cache of shards.

    Args:
        source: what is read.
        out: folder that appears when it is complete.
        image_size: side of the images that the files were made of, in pixels.
        vae_hash: of the VAE that made them, see `data.vae.VAE.weights_hash`.
        dtype: of the moments, one of `data.manifest.DTYPES`.
        shard_size: images per file.
        num_workers: processes that read.
        timeout: seconds to wait for one of them.

    Raises:
        UserError: an unreadable file, values beyond `dtype`, or `out` exists.
    """
    count = len(source)
    ranges = [range(i, min(i + shard_size, count)) for i in range(0, count, shard_size)]
    read = DataLoader(
        _Shards(source, ranges, dtype),
        batch_size=None,
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        worker_init_fn=steady,
    )
    refuse_taken(out, "is not empty")
    with made_alone(out) as folder:
        shards = list(_written(source, read, ranges, folder))
        Manifest(
            vae_path=source.vae_path,
            vae_hash=vae_hash,
            scaling_factor=source.scaling_factor,
            shift_factor=source.shift_factor,
            image_size=image_size,
            crop=CROP,
            latent_shape=source.latent_shape,
            dtype=dtype,
            class_names=source.class_names,
            count=count,
            shards=shards,
        ).write(folder)
    get_logger("data.convert_cache").info("%s: %d images in %d shards", out, count, len(shards))


def _written(
    source: PublishedCache, read: DataLoader, ranges: list[range], folder: Path
) -> Iterator[Shard]:
    with progress(None, ALONE, "converting", "img", total=len(source)) as bar:
        arriving = iter(read)
        for number, indices in enumerate(ranges):
            reading = f"{source.name(indices[0])} to {source.name(indices[-1])}"
            moments = next_of(arriving, reading, "nothing is written")
            if isinstance(moments, str):
                raise UserError(moments)
            labels = source.labels(indices).numpy()
            names = [source.name(index) for index in indices]
            yield Shard.write(folder, number, np.asarray(moments), labels, names)
            bar.update(len(indices))


def _parse() -> argparse.Namespace:
    parser = Parser("data.convert_cache", __doc__)
    add = parser.add_argument
    needed = {"required": True, "default": argparse.SUPPRESS}
    add("--from", dest="source", **needed, help="published cache: DIR/<class>/<name>.npz")
    add("--out", type=Path, **needed, help="folder to write")
    add("--contents", choices=CONTENTS, **needed, help="what the arrays are: data/published.py")
    add("--img-size", type=positive, **needed, help="side of the images, in pixels")
    add("--vae-path", default="stabilityai/sd-vae-ft-mse", help="VAE that made them")
    add("--dtype", choices=DTYPES, default="float16", help="of stored moments")
    add("--shard-size", type=positive, default=4096, help="images per file")
    workers = min(4, os.cpu_count() or 1)
    add("--num-workers", type=natural, default=workers, help="processes that read")
    add("--timeout", type=positive, default=600, help="seconds to wait for one of them")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line and convert."""
    flags = _parse()
    refuse_taken(flags.out, "is not empty")
    with as_flags(FLAGS):
        vae = VAE(flags.vae_path)
        source = PublishedCache(flags.source, flags.contents, vae)
    factor = flags.img_size // source.latent_shape[-1]
    if factor != vae.factor:
        raise UserError(
            f"--img-size: latents of {source.latent_shape} come from images of "
            f"{source.latent_shape[-1] * vae.factor} pixels with {vae.path}, not {flags.img_size}"
        )
    options = (flags.dtype, flags.shard_size, flags.num_workers, flags.timeout)
    with as_flags(FLAGS):
        convert_cache(source, flags.out, flags.img_size, vae.weights_hash(), *options)


if __name__ == "__main__":
    main()
