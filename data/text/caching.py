"""Encodes the captions of a latent cache's images into a text cache, over any number of processes.

As for latents, the unit of work is a shard: a fixed block of consecutive distinct captions. Batches
are fixed by shard and batch size, so the bytes do not depend on how many processes there are, and a
killed run is taken up again with the shards that have no record.
"""

import dataclasses
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.files import complete_file, sweep
from core.locks import exclusive
from core.logging import get_logger, progress
from data.caching import PLAN, other_plan
from data.encoding import KEPT
from data.images import PATIENCE
from data.latents import LatentCache
from data.manifest import MANIFEST
from data.text.cache import TextCache, names_hash
from data.text.captions import CaptionOptions, Captions, read_captions
from data.text.encoder import TextEncoder
from data.text.encoding import as_stored, encode_shards, read_record
from data.text.manifest import FIELD, KINDS, WHOLE, Stored, TextManifest, bytes_of, write_array

log = get_logger("data.text.caching")


@dataclass(frozen=True)
class TextOptions:
    """What to encode and how.

    Attributes:
        captions: where they are.
        cached_path: latent cache whose images they are of.
        text_cached_path: folder to write.
        text_encoder: hub id or folder of the encoder.
        max_length, layer, prefix, dtype: see `data.text.encoder.TextEncoder`.
        batch_size: captions per forward pass.
        shard_size: captions per file.
        overwrite: replace what is there, finished or not.
    """

    captions: CaptionOptions
    cached_path: str
    text_cached_path: str
    text_encoder: str
    max_length: int
    layer: int | None = None
    prefix: str = ""
    dtype: str = "bfloat16"
    batch_size: int = 64
    shard_size: int = 4096
    overwrite: bool = False


def cache_text(options: TextOptions, processes: Processes) -> None:
    """Write the text cache; every process calls this.

    Raises:
        UserError: no latent cache, captions that are missing or damaged, a bad encoder, a finished
            text cache without `overwrite`, one that somebody else is writing, or a full disk.
    """
    out = Path(options.text_cached_path)
    check_unfinished(out, options.overwrite)
    names = LatentCache(options.cached_path).names()
    captions = read_captions(options.captions, names)
    with processes.main_first():
        encoder = open_encoder(options, processes.device)
    with exclusive(out, FIELD, processes):
        _write(out, options, processes, encoder, captions, names)


def open_encoder(options: TextOptions, device: str | torch.device) -> TextEncoder:
    """The encoder that is asked for."""
    return TextEncoder(
        options.text_encoder,
        options.max_length,
        layer=options.layer,
        prefix=options.prefix,
        dtype=options.dtype,
        device=device,
    )


def check_unfinished(out: Path, overwrite: bool) -> None:
    """Raises ConfigError where `out` is a finished cache that is not to be replaced."""
    if (out / MANIFEST).exists() and not overwrite:
        raise ConfigError(_finished(out))


def _finished(out: Path) -> str:
    return f"{FIELD}: {out} is a finished cache; --overwrite replaces it"


def _write(
    out: Path,
    options: TextOptions,
    processes: Processes,
    encoder: TextEncoder,
    captions: Captions,
    names: list[str],
) -> None:
    """Write what is missing of the cache, whose folder is ours alone."""
    size, count = options.shard_size, len(captions.texts)
    shards = [range(first, min(first + size, count)) for first in range(0, count, size)]
    refusal, missing = None, []
    if processes.is_main:
        refusal = _prepare(out, options, encoder, captions, names)
        if refusal is None:
            missing = [n for n in range(len(shards)) if read_record(out, n) is None]
    refusal, missing = processes.from_main((refusal, missing))
    if refusal is not None:
        raise ConfigError(refusal)
    encode_shards(out, options.batch_size, processes, encoder, captions.texts, shards, missing)
    processes.barrier()
    if processes.is_main:
        try:
            _finish(out, encoder, captions, names, len(shards))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{FIELD}: cannot write to {out}: {reason}; {KEPT}") from error
    processes.barrier()


def _prepare(
    out: Path, options: TextOptions, encoder: TextEncoder, captions: Captions, names: list[str]
) -> str | None:
    """Make the folder, or see that what lies in it can be gone on with; why not, if not."""
    facts = dataclasses.asdict(encoder.facts())
    del facts["encoder"]  # it may have moved
    plan = facts | {
        "images": names_hash(names),
        "captions": _contents_hash(captions),
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
    }
    try:
        sweep(out)
        if (out / MANIFEST).exists() and not options.overwrite:  # written by another meanwhile
            return _finished(out)
        if options.overwrite:
            _clear(out)
        refusal = other_plan(out, plan)
        if refusal is not None:
            return f"{FIELD}: {out} holds {refusal}; --overwrite starts anew"
        if not (out / PLAN).exists():
            _clear(out)
        refusal = _room(out, encoder, captions)
        if refusal is None:
            with complete_file(out / PLAN) as temporary:
                temporary.write_text(json.dumps(plan))
        return refusal
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{FIELD}: cannot write to {out}: {error.strerror or error}"


def _contents_hash(captions: Captions) -> str:
    """SHA-256 over everything that is cached of captions but their rows."""
    digest = hashlib.sha256(json.dumps([captions.texts, captions.sources]).encode())
    for values in (captions.offsets, captions.numbers, captions.source_numbers):
        digest.update(values)
    return digest.hexdigest()


def _clear(out: Path) -> None:
    """Remove a text cache, or what an older run left of one."""
    # The manifest goes first: without it the rest is no cache.
    for name in (MANIFEST, PLAN, *WHOLE):
        (out / name).unlink(missing_ok=True)
    for pattern in (*(f"{kind}-*.{suffix}" for kind, suffix in KINDS.items()), "done-*.json"):
        for file in out.glob(pattern):
            file.unlink()


TOKENISED = 4096
"""Captions that are tokenised at once, to count their tokens."""


def _room(out: Path, encoder: TextEncoder, captions: Captions) -> str | None:
    """Say how large the cache will be; why not, if the disk has no room for what is missing."""
    encoder.tokens([""])  # the empty caption has to have some
    texts, most = captions.texts, encoder.max_length
    lengths = _lengths(encoder, texts)
    rows, facts = int(np.minimum(lengths, most).sum()), encoder.facts()
    size, padded = bytes_of(rows, facts), bytes_of(len(texts) * most, facts)
    log.info(
        "%s: %d images, %d captions, %d of them distinct, %.1f tokens each: %.3g GB (%.3g GB if "
        "padded to %d)",
        *(out, len(captions), len(captions.numbers), len(texts), rows / len(texts)),
        *(size / 1e9, padded / 1e9, most),
    )
    long = np.flatnonzero(lengths > most)
    if len(long):
        log.warning(
            "%d captions are cut at %d tokens, the longest has %d; first %r",
            *(len(long), most, lengths.max(), texts[long[0]][:100]),
        )
    there = sum(file.stat().st_size for file in out.glob("tokens-*.npy"))
    free = shutil.disk_usage(out).free
    if size - there > free:
        return (
            f"{FIELD}: {out} needs {(size - there) / 1e9:.3g} GB more, its disk has "
            f"{free / 1e9:.3g} GB left"
        )
    return None


def _lengths(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Tokens of each caption before it is cut."""
    found: list[int] = []
    with progress(None, None, "tokenising", "caption", total=len(texts), delay=PATIENCE) as bar:
        for first in range(0, len(texts), TOKENISED):
            found += encoder.lengths(texts[first : first + TOKENISED])
            bar.update(len(found) - first)
    return np.array(found)


def _finish(
    out: Path, encoder: TextEncoder, captions: Captions, names: list[str], shards: int
) -> None:
    """Write what belongs to the whole and put the records together; it is a cache then."""
    records = [read_record(out, number) for number in range(shards)]
    null = encoder.encode([""])[0]
    values = (as_stored(null), captions.offsets, captions.numbers, captions.source_numbers)
    for name, array in zip(WHOLE, values, strict=True):
        write_array(out / name, array)
    manifest = TextManifest(
        facts=encoder.facts(),
        images=len(captions),
        image_names=names_hash(names),
        entries=len(captions.numbers),
        captions=len(captions.texts),
        sources=captions.sources,
        null_rows=len(null),
        files={name: Stored.of(out / name) for name in WHOLE},
        shards=records,
    )
    manifest.write(out)
    for path in (out / PLAN, *out.glob("done-*.json")):
        path.unlink()
    rows = sum(shard.rows for shard in records)
    log.info("%s: %d captions of %d tokens in %d shards", out, manifest.captions, rows, shards)


def verify_text(path: str, cached_path: str | None = None) -> None:
    """Read a text cache again and compare it with its checksums, and with its images if named.

    Raises:
        UserError: naming the first file that is missing or changed.
    """
    cache = TextCache(path)
    if cached_path is not None:
        cache.check_images(LatentCache(cached_path))
    cache.verify()
    log.info("%s: %d captions, every checksum holds", path, cache.captions)
