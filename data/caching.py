"""Encodes a folder of images into a cache of latents, over any number of processes.

The unit of work is a shard: a fixed block of consecutive images. A process takes whole shards, and
no batch crosses a shard's border, so the bytes do not depend on how many processes there are. A
shard that is done leaves a record beside it, and a run that was killed is taken up again with the
shards that have none.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.files import complete_file, sweep
from core.locks import exclusive
from core.logging import get_logger
from data.encoding import KEPT, CacheOptions, encode_shards, read_record
from data.images import CROP_RULE, ImageSource
from data.latents import LatentCache
from data.manifest import KINDS, MANIFEST, Manifest
from data.tars import open_images
from data.vae import VAE

PLAN = "unfinished.json"
"""What an unfinished cache is made of: a run goes on only with the same."""

REPORT = "unreadable.txt"
"""Images that were passed over, one line each, with the reason."""

log = get_logger("data.caching")


def cache_latents(
    options: CacheOptions, processes: Processes, images: ImageSource | None = None
) -> None:
    """Write the cache; every process calls this.

    Args:
        options: what to cache and how.
        processes: that share the work.
        images: those of `options.data_path`, where they have been looked up already.

    Raises:
        UserError: bad folder, VAE or image size, an unreadable image, a finished cache without
            `overwrite`, a cache that somebody else is writing, a full disk, a reading process that
            died or hangs, or values beyond the range of `dtype`.
    """
    out = Path(options.cached_path)
    if is_finished(options):
        raise ConfigError(_finished(out))
    folder = images or open_images(options.data_path, processes)
    with processes.main_first():
        vae = VAE(options.vae_path, processes.device)
    if options.image_size % vae.factor:
        raise ConfigError(
            f"data.image_size: {options.image_size} is not a multiple of the VAE's {vae.factor}"
        )
    with exclusive(out, "data.cached_path", processes):
        _write(out, options, processes, vae, folder)


def is_finished(options: CacheOptions) -> bool:
    """Whether the cache is there already, and is to stay."""
    return (Path(options.cached_path) / MANIFEST).exists() and not options.overwrite


def _finished(out: Path) -> str:
    return f"data.cached_path: {out} is a finished cache; --overwrite replaces it"


def _write(
    out: Path, options: CacheOptions, processes: Processes, vae: VAE, folder: ImageSource
) -> None:
    """Write what is missing of the cache, whose folder is ours alone."""
    manifest = _describe(options, vae, folder)
    shards = [
        range(first, min(first + options.shard_size, len(folder)))
        for first in range(0, len(folder), options.shard_size)
    ]
    refusal, missing = None, []
    if processes.is_main:
        refusal = _prepare(out, options, manifest, folder)
        if refusal is None:
            missing = [n for n in range(len(shards)) if read_record(out, n) is None]
    refusal, missing = processes.from_main((refusal, missing))
    if refusal is not None:
        raise ConfigError(refusal)
    start = time.perf_counter()
    encoded = encode_shards(options, processes, vae, folder, shards, missing)
    encoded = sum(processes.gather(encoded))
    if processes.is_main:
        try:
            manifest = _finish(out, manifest, len(shards))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"data.cached_path: cannot write to {out}: {reason}; {KEPT}") from error
        rate = encoded / (time.perf_counter() - start)
        log.info(
            "%s: %d images of %d classes in %d shards, %.1f images/s",
            *(out, manifest.count, len(folder.class_names), len(manifest.shards), rate),
        )
    processes.barrier()


def _describe(options: CacheOptions, vae: VAE, folder: ImageSource) -> Manifest:
    """The manifest, still without its shards."""
    side = options.image_size // vae.factor
    return Manifest(
        vae_path=vae.path,
        vae_hash=vae.weights_hash(),
        scaling_factor=vae.scaling_factor,
        shift_factor=vae.shift_factor,
        image_size=options.image_size,
        crop=CROP_RULE,
        latent_shape=(vae.latent_channels, side, side),
        dtype=options.dtype,
        class_names=folder.class_names,
        views=options.views,
    )


def _prepare(
    out: Path, options: CacheOptions, manifest: Manifest, folder: ImageSource
) -> str | None:
    """Make the folder, or see that what lies in it can be gone on with; why not, if not."""
    names = "\n".join(folder.name(index) for index in range(len(folder)))
    # Not `on_error`: who stopped at a bad image goes on with `skip`.
    plan = dataclasses.asdict(manifest) | {
        "images": hashlib.sha256(os.fsencode(names)).hexdigest(),
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "vae_dtype": options.vae_dtype,
    }
    plan = json.loads(json.dumps(plan))
    try:
        sweep(out)
        if is_finished(options):  # by whoever wrote it while the images were looked through
            return _finished(out)
        if options.overwrite:
            _clear(out)
        refusal = other_plan(out, plan)
        if refusal is not None:
            return f"data.cached_path: {out} holds {refusal}; --overwrite starts anew"
        if not (out / PLAN).exists():
            _clear(out)
        refusal = _room(out, manifest, len(folder))
        if refusal is None:
            with complete_file(out / PLAN) as temporary:
                temporary.write_text(json.dumps(plan))
        return refusal
    except OSError as error:
        return f"data.cached_path: cannot write to {out}: {error.strerror or error}"


def other_plan(out: Path, plan: dict) -> str | None:
    """The unfinished cache in a folder that is not gone on with; None where all is well."""
    if not (out / PLAN).exists():
        return None
    try:
        found = json.loads((out / PLAN).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return f"a damaged {PLAN}"
    keys = [key for key in plan if found.get(key) != plan[key]]
    return f"an unfinished cache with another {', '.join(keys)}" if keys else None


def _clear(out: Path) -> None:
    """Remove a cache, or what an older run left of one."""
    # The manifest goes first: without it the rest is no cache.
    for name in (MANIFEST, PLAN, REPORT):
        (out / name).unlink(missing_ok=True)
    patterns = [f"{kind}-*.{suffix}" for kind, suffix in KINDS.items()]
    for pattern in (*patterns, "done-*.json"):
        for file in out.glob(pattern):
            file.unlink()


def _room(out: Path, manifest: Manifest, images: int) -> str | None:
    """Say how large the cache will be; why not, if the disk has no room for what is missing."""
    size = manifest.bytes_of(images)
    there = sum(file.stat().st_size for file in out.glob("moments-*.npy"))
    free = shutil.disk_usage(out).free
    log.info("%s: %d images, %.2f GiB", out, images, size / 2**30)
    if size - there > free:
        return (
            f"data.cached_path: {out} needs {(size - there) / 2**30:.2f} GiB more, its disk has "
            f"{free / 2**30:.2f} GiB left"
        )
    return None


def _finish(out: Path, manifest: Manifest, shards: int) -> Manifest:
    """Put the shards' records together; the manifest makes it a cache."""
    records = [read_record(out, number) for number in range(shards)]
    unreadable = [line for _, lines in records for line in lines]
    if unreadable:
        with complete_file(out / REPORT) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in unreadable), encoding="utf-8")
        log.warning("%d unreadable images were passed over: %s", len(unreadable), out / REPORT)
    filled = [shard for shard, _ in records if shard.count > 0]
    if not filled:
        raise UserError(f"data.data_path: none of the images is readable; see {out / REPORT}")
    count = sum(shard.count for shard in filled)
    manifest = dataclasses.replace(manifest, shards=filled, count=count)
    manifest.write(out)
    for path in (out / PLAN, *out.glob("done-*.json")):
        path.unlink()
    return manifest


def verify_cache(path: str) -> None:
    """Read a cache again and compare it with its checksums.

    Raises:
        UserError: naming the first file that is missing or changed.
    """
    cache = LatentCache(path)
    cache.verify()
    log.info("%s: %d images, every checksum holds", path, len(cache))
