"""Encoding shards of captions, and writing their rows where they belong as they come.

A shard that is done leaves a record, `done-00000.json`, beside its files.

Shapes: n captions of a shard, R rows of all of them, E width of a row.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError
from core.files import complete_file
from core.logging import get_logger, progress
from data.encoding import KEPT
from data.manifest import stored_dtype
from data.text.encoder import TextEncoder
from data.text.manifest import (
    FIELD,
    KINDS,
    Stored,
    TextShard,
    shard_path,
    write_array,
)

log = get_logger("data.text.encoding")


def _record_path(out: Path, number: int) -> Path:
    return out / f"done-{number:05d}.json"


def read_record(out: Path, number: int) -> TextShard | None:
    """A finished shard; None if it is not there or not whole."""
    path = _record_path(out, number)
    if not path.exists():
        return None
    try:
        shard = TextShard.parse(json.loads(path.read_text()))
        if shard.number != number:
            raise ValueError(f"is of shard {shard.number}")
        for stored, file in shard.paths(out):
            stored.check(file)
        return shard
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("%s: %s; it is made again", path, error)
        return None


def encode_shards(
    out: Path,
    batch_size: int,
    processes: Processes,
    encoder: TextEncoder,
    texts: list[str],
    shards: list[range],
    missing: list[int],
) -> None:
    """Encode and write this process's part of the missing shards.

    Args:
        out: the cache's folder.
        batch_size: captions per forward pass.
        processes: that share the work.
        encoder: of this process.
        texts: all captions.
        shards: the captions of each.
        missing: numbers of shards that are to be made.

    Raises:
        UserError: a caption whose rows are not finite, or a disk that cannot be written.
    """
    numbers = missing[processes.rank :: processes.world_size]
    todo = sum(len(shards[number]) for number in numbers)
    done = len(texts) - sum(len(shards[number]) for number in missing)
    done //= processes.world_size
    bar = progress(None, processes, "encoding", "caption", total=done + todo, initial=done)
    with bar:
        for number in numbers:
            own = [texts[place] for place in shards[number]]
            try:
                shard = _encode_shard(out, number, own, encoder, batch_size, bar.update)
                with complete_file(_record_path(out, number)) as temporary:
                    temporary.write_text(json.dumps(dataclasses.asdict(shard)))
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{FIELD}: cannot write to {out}: {reason}; {KEPT}") from error


def _encode_shard(
    out: Path,
    number: int,
    texts: list[str],
    encoder: TextEncoder,
    batch_size: int,
    tell: Callable[[int], object],
) -> TextShard:
    """Write the files of a shard and describe them; `tell` hears how many captions are done."""
    lengths = [len(tokens) for tokens in encoder.tokens(texts)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    checks = np.zeros(len(texts), dtype=np.uint32)
    # Captions of a length go together, so that little is padded; the longest first, since what has
    # memory enough for them has it for all.
    order = sorted(range(len(texts)), key=lambda place: -lengths[place])
    dtype, rows = stored_dtype(encoder.dtype), int(offsets[-1])
    with complete_file(shard_path(out, "tokens", number)) as path, path.open("wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (rows, encoder.hidden_size)}
        np.lib.format.write_array_header_1_0(file, header)
        start, row_bytes = file.tell(), encoder.hidden_size * dtype.itemsize
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            encoded = encoder.encode([texts[place] for place in places])
            for place, values in zip(places, encoded, strict=True):
                content = as_stored(values)
                checks[place] = zlib.crc32(content)
                file.seek(start + int(offsets[place]) * row_bytes)
                file.write(content)
            tell(len(places))
    write_array(shard_path(out, "offsets", number), offsets)
    write_array(shard_path(out, "checks", number), checks)
    with complete_file(shard_path(out, "texts", number)) as path:
        lines = [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
        path.write_text("".join(lines), encoding="utf-8")
    files = {kind: Stored.of(shard_path(out, kind, number)) for kind in KINDS}
    return TextShard(number, len(texts), rows, files)


def as_stored(rows: Tensor) -> np.ndarray:
    """Rows (L, E) as numpy can write them: it has no bfloat16."""
    rows = rows.contiguous()
    return (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows).numpy()
