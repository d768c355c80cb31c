"""Encoding shards of images: reading, the VAE, and writing beside the next shard's encoding.

A shard that is done leaves a record, `done-00000.json`, beside its files.

Shapes: B batch, V views of an image, C latent channels, h and w height and width of the latent.
"""

import dataclasses
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
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
from data.images import ImageSource, to_float
from data.manifest import VIEWS, Shard, stored_dtype
from data.vae import VAE
from data.workers import next_of, steady

KEPT = "finished shards stay, and the same command goes on after them"
"""What of a cache survives a failure."""

log = get_logger("data.encoding")


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
        overwrite: replace what is there, finished or not.
        on_error: `stop` at an unreadable image, or `skip` it and list it in REPORT.
        vae_dtype: precision of the encoder; `bfloat16` is faster and differs.
        timeout: seconds to wait for a process that reads images.
        views: 2 for images and their mirror images, 1 for images alone.
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
    on_error: str = "stop"
    vae_dtype: str = "float32"
    timeout: int = 600
    views: int = VIEWS


def _record_path(out: Path, number: int) -> Path:
    return out / f"done-{number:05d}.json"


def read_record(out: Path, number: int) -> tuple[Shard, list[str]] | None:
    """A finished shard and its unreadable images; None if it is not there or not whole."""
    path = _record_path(out, number)
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        shard, unreadable = Shard.of(values["shard"]), list(map(str, values["unreadable"]))
        if shard.number != number:
            raise ValueError(f"is of shard {shard.number}")
        shard.check(out)
        return shard, unreadable
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("%s: %s; it is made again", path, error)
        return None


@dataclass
class _Batch:
    """Readable images (B, 3, size, size) uint8, their indices, and what was wrong with others."""

    images: Tensor
    indices: list[int]
    errors: list[str]

    def pin_memory(self) -> "_Batch":
        """What the loader asks for when images go to a GPU."""
        return dataclasses.replace(self, images=self.images.pin_memory())


class _Batches(Dataset):
    """Batches of images; an unreadable one arrives as a message.

    A worker's exception would reach the main process as a traceback in the message's place.
    """

    def __init__(self, folder: ImageSource, size: int):
        self.folder = folder
        self.size = size

    def __getitems__(self, indices: list[int]) -> _Batch:
        images, read, errors = [], [], []
        for index in indices:
            try:
                images.append(self.folder.load(index, self.size))
                read.append(index)
            except UserError as error:
                errors.append(" ".join(str(error).split()))
        shape = (0, 3, self.size, self.size)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return _Batch(stacked, read, errors)


def _as_it_is(batch: _Batch) -> _Batch:
    return batch


def encode_shards(
    options: CacheOptions,
    processes: Processes,
    vae: VAE,
    folder: ImageSource,
    shards: list[range],
    missing: list[int],
) -> int:
    """Encode and write this process's part of the missing shards; how many images these were."""
    size = options.batch_size
    numbers = missing[processes.rank :: processes.world_size]
    batches = {
        number: [
            list(shards[number][first : first + size])
            for first in range(0, len(shards[number]), size)
        ]
        for number in numbers
    }
    work = [batch for number in numbers for batch in batches[number]]
    arriving = iter(_loader(options, folder, work, processes))
    todo = sum(len(shards[number]) for number in numbers)
    done = len(folder) - sum(len(shards[number]) for number in missing)
    done //= processes.world_size
    bar = progress(None, processes, "encoding", "img", total=done + todo, initial=done)
    encoder = _Encoder(vae, options)
    with bar, ThreadPoolExecutor(max_workers=1) as writer:
        pending: list[Future] = []
        for number in numbers:
            moments, read, errors = [encoder.none], [], []
            for wanted in batches[number]:
                batch = next_of(arriving, _reading(folder, wanted), KEPT)
                if batch.errors and options.on_error == "stop":
                    raise UserError(batch.errors[0])
                if batch.indices:
                    moments.append(encoder(batch.images))
                read += batch.indices
                errors += batch.errors
                bar.update(len(batch.indices) + len(batch.errors))
            for done in pending:  # at most one shard waits in memory
                done.result()
            arguments = number, np.concatenate(moments), read, errors
            pending = [writer.submit(_write_shard, options, folder, *arguments)]
        for done in pending:
            done.result()
    return todo


def _loader(
    options: CacheOptions, folder: ImageSource, work: list[list[int]], processes: Processes
) -> DataLoader:
    """Reads the batches `work` of indices, in their order."""
    return DataLoader(
        _Batches(folder, options.image_size),
        batch_sampler=work,
        num_workers=options.num_workers,
        collate_fn=_as_it_is,
        timeout=options.timeout if options.num_workers else 0,
        worker_init_fn=steady,
        pin_memory=processes.device.type == "cuda",
    )


def _reading(folder: ImageSource, indices: list[int]) -> str:
    return f"{folder.paths[indices[0]]} ... {os.path.basename(folder.paths[indices[-1]])}"


class _Encoder:
    """Images to moments in the cache's dtype, as an array that can be written.

    Attributes:
        none: such an array of no images.
    """

    def __init__(self, vae: VAE, options: CacheOptions):
        self.vae, self.dtype, self.views = vae, options.dtype, options.views
        self.bf16 = options.vae_dtype == "bfloat16"
        self.compared = not self.bf16
        side = options.image_size // vae.factor
        shape = (0, self.views, 2 * vae.latent_channels, side, side)
        self.none = np.empty(shape, dtype=stored_dtype(self.dtype))

    def __call__(self, images: Tensor) -> np.ndarray:
        """Moments (B, V, 2C, h, w) of the views of images (B, 3, H, W) uint8."""
        images = to_float(images.to(self.vae.device, non_blocking=True))
        wanted = [images, images.flip(-1)][: self.views]
        moments = torch.stack([self._moments(view) for view in wanted], dim=1)
        moments = moments.to(getattr(torch, self.dtype))
        if not torch.isfinite(moments).all():
            raise UserError(
                f"dtype: the VAE's moments do not fit {self.dtype}; try --dtype float32"
            )
        moments = moments.cpu()
        return (moments.view(torch.uint16) if self.dtype == "bfloat16" else moments).numpy()

    def _moments(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            moments = self.vae.encode_moments(images).float()
        if not self.compared:
            self.compared = True
            away = (moments - self.vae.encode_moments(images)).square().mean().sqrt()
            log.info("VAE in bfloat16: moments are %.2g (RMS) from float32 on a sample", away)
        return moments


def _write_shard(
    options: CacheOptions,
    folder: ImageSource,
    number: int,
    moments: np.ndarray,
    read: list[int],
    errors: list[str],
) -> None:
    """The shard's files, then its record."""
    out = Path(options.cached_path)
    names = [folder.name(index) for index in read]
    try:
        shard = Shard.write(out, number, moments, folder.labels[read], names)
        with complete_file(_record_path(out, number)) as temporary:
            values = {"shard": dataclasses.asdict(shard), "unreadable": errors}
            temporary.write_text(json.dumps(values))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.cached_path: cannot write to {out}: {reason}; {KEPT}") from error
