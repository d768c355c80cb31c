"""Reading caches of encoded captions; each caption is checked when it is read first.

Shapes: L rows of a caption, E width of a row.
"""

import hashlib
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.errors import UserError
from core.logging import progress
from data.latents import LatentCache
from data.manifest import stored_dtype
from data.mapped import mapped
from data.text.captions import first_without
from data.text.facts import TextFacts
from data.text.manifest import AGAIN, FIELD, TextManifest, read_manifest, shard_path


def names_hash(names: Sequence[str]) -> str:
    """SHA-256 over the names of images in their order: which images a text cache is of."""
    text = "".join(f"{name}\n" for name in names)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


class TextCache:
    """Reader of a text cache; the files stay on disk, mapped into memory.

    Copies that travel to other processes map the files for themselves.

    Args:
        path: the cache's folder; it may be read-only.

    Attributes:
        manifest: what the rows are.
        facts: of the encoder.
        sources: names of the captions' sources.
        null: rows (L, E) of the empty caption, in the stored dtype.

    Raises:
        UserError: not a finished text cache, another version, or a file is missing or truncated.
    """

    def __init__(self, path: str | Path):
        self.folder = Path(path)
        self.path = str(path)
        self.manifest: TextManifest = read_manifest(self.folder)
        for stored, file in self.manifest.stored(self.folder):
            stored.check(file)
        self.facts: TextFacts = self.manifest.facts
        self.sources = self.manifest.sources
        self.dtype = getattr(torch, self.facts.dtype)
        self._ends = np.cumsum([shard.count for shard in self.manifest.shards])
        shape = (self.manifest.null_rows, self.facts.hidden_size)
        null = self._whole("null.npy", shape, stored_dtype(self.facts.dtype))
        self.null = torch.from_numpy(null.copy()).view(self.dtype)
        self._open: dict[int, _OpenShard] = {}
        self._texts: dict[int, list[str]] = {}
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}, "_texts": {}, "_index": None}

    def __len__(self) -> int:
        return self.manifest.images

    @property
    def captions(self) -> int:
        """How many distinct captions there are."""
        return self.manifest.captions

    def choices(self, image: int) -> list[tuple[int, int]]:
        """(number of the caption, number of its source) for each caption of an image."""
        offsets, captions, sources = self._entries()
        if not 0 <= image < len(self):
            raise IndexError(f"image {image} of {len(self)}")
        places = slice(offsets[image], offsets[image + 1])
        return list(zip(captions[places].tolist(), sources[places].tolist(), strict=True))

    def first_without(self, sources: Collection[str]) -> int | None:
        """The first image that has no caption of these sources; None if all have."""
        offsets, _, numbers = self._entries()
        return first_without(offsets, numbers, [self.sources.index(name) for name in sources])

    def _entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the images: where their entries begin, and each entry's caption and source."""
        if self._index is None:
            images, entries = self.manifest.images, self.manifest.entries
            self._index = (
                self._whole("image-offsets.npy", (images + 1,), np.dtype(np.int64)),
                self._whole("image-captions.npy", (entries,), np.dtype(np.int64)),
                self._whole("image-sources.npy", (entries,), np.dtype(np.uint8)),
            )
        return self._index

    def text(self, caption: int) -> str:
        """The caption of a number."""
        shard, inside = self._place(caption)
        if shard not in self._texts:
            about = self.manifest.shards[shard]
            path = shard_path(self.folder, "texts", about.number)
            about.files["texts"].check_contents(path)
            lines = path.read_text(encoding="utf-8").split("\n")[:-1]
            self._texts[shard] = [json.loads(line) for line in lines]
        return self._texts[shard][inside]

    def rows(self, captions: Sequence[int]) -> list[Tensor]:
        """Rows (L, E) of each caption, in the stored dtype.

        Raises:
            UserError: naming a file whose bytes are not what was written.
        """
        found = []
        for caption in captions:
            shard, inside = self._place(caption)
            if shard not in self._open:
                self._open[shard] = _OpenShard(self, shard)
            found.append(torch.from_numpy(self._open[shard].read(inside)).view(self.dtype))
        return found

    def verify(self) -> None:
        """Read every byte and compare with the checksums.

        Raises:
            UserError: naming the first file that changed.
        """
        files = self.manifest.stored(self.folder)
        total = sum(stored.size for stored, _ in files)
        with progress(None, None, "verifying", "B", total=total, unit_scale=True) as bar:
            for stored, path in files:
                stored.check_contents(path)
                bar.update(stored.size)

    def check_images(self, latents: LatentCache) -> None:
        """See that the captions are those of the images of a latent cache.

        Raises:
            UserError: naming both.
        """
        here, there = len(self), len(latents)
        if here != there:
            why = f"{here} images and {there}"
        elif self.manifest.image_names != names_hash(latents.names()):
            why = f"{here} images each, of other names"
        else:
            return
        raise UserError(
            f"{FIELD}: {self.path} is not of the images of {latents.path} ({why}); {AGAIN} "
            "--text-only"
        )

    def check_encoder(self, facts: TextFacts, whose: str) -> None:
        """See that rows mean the same to `whose`, such as a checkpoint's name.

        Raises:
            UserError: naming the first difference.
        """
        difference = self.facts.difference(facts)
        if difference is not None:
            raise UserError(
                f"{FIELD}: {self.path} and {whose} have different text encoders: {difference}"
            )

    def _place(self, caption: int) -> tuple[int, int]:
        """Shard of a caption and its place there."""
        if not 0 <= caption < self.captions:
            raise IndexError(f"caption {caption} of {self.captions}")
        shard = int(np.searchsorted(self._ends, caption, side="right"))
        return shard, int(caption - self._ends[shard] + self.manifest.shards[shard].count)

    def _whole(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        path = self.folder / name
        self.manifest.files[name].check_contents(path)
        return mapped(path, shape, dtype, FIELD)


class _OpenShard:
    """The mapped files of one shard; `tokens` are its rows (R, E)."""

    def __init__(self, cache: TextCache, position: int):
        shard, facts = cache.manifest.shards[position], cache.facts
        paths = {kind: shard_path(cache.folder, kind, shard.number) for kind in shard.files}
        for kind in ("offsets", "checks"):
            shard.files[kind].check_contents(paths[kind])
        self.path, shape = paths["tokens"], (shard.rows, facts.hidden_size)
        self.tokens = mapped(self.path, shape, stored_dtype(facts.dtype), FIELD)
        self.offsets = mapped(paths["offsets"], (shard.count + 1,), np.dtype(np.int64), FIELD)
        self.checks = mapped(paths["checks"], (shard.count,), np.dtype(np.uint32), FIELD)
        self.checked = np.zeros(shard.count, dtype=bool)

    def read(self, place: int) -> np.ndarray:
        """A copy of a caption's rows, compared with its checksum when it is read first."""
        rows = self.tokens[self.offsets[place] : self.offsets[place + 1]].copy()
        if not self.checked[place]:
            if zlib.crc32(rows) != self.checks[place]:
                raise UserError(
                    f"{FIELD}: {self.path} changed since it was written, at caption {place} of it; "
                    f"{AGAIN}"
                )
            self.checked[place] = True
        return rows
