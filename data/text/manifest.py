"""The cache of encoded captions: what lies on the disk.

A text cache is a folder beside a latent cache, with `manifest.json`, numbered files of a fixed
number of distinct captions each, and files of the whole:

    tokens-00000.npy    (R, E) float32, or bfloat16 as uint16; the captions' rows in a row
    offsets-00000.npy   (n + 1,) int64, where the rows of each caption begin
    checks-00000.npy    (n,) uint32, CRC-32 of each caption's rows
    texts-00000.jsonl   n lines, the captions as JSON strings
    null.npy            (L, E), the rows of the empty caption
    image-offsets.npy   (N + 1,) int64, where the entries of each image begin
    image-captions.npy  (M,) int64, numbers of captions
    image-sources.npy   (M,) uint8, numbers of their sources

Captions are numbered through all shards by their first appearance. Nothing is padded. The manifest
is written last: a folder without it is not a cache.

Shapes: N images, M entries of images, R rows, E width of a row, n captions of a shard.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from core.files import complete_file, file_hash
from data.manifest import MANIFEST
from data.text.facts import TextFacts

VERSION = 1
FIELD = "data.text_cached_path"
KINDS = {"tokens": "npy", "offsets": "npy", "checks": "npy", "texts": "jsonl"}
WHOLE = ("null.npy", "image-offsets.npy", "image-captions.npy", "image-sources.npy")
HEADER = 128
"""Bytes before the numbers of a .npy file of two dimensions."""
AGAIN = "make the text cache again with main_cache.py"


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """One file of a shard; `kind` is one of KINDS."""
    return folder / f"{kind}-{number:05d}.{KINDS[kind]}"


@dataclass(frozen=True)
class Stored:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "Stored":
        """Of a file that is there."""
        return cls(path.stat().st_size, file_hash(path))

    @classmethod
    def parse(cls, values: Any) -> "Stored":
        """What stands in a manifest; ValueError, TypeError or KeyError if it is something else."""
        found = cls(**values)
        if type(found.size) is not int or type(found.sha256) is not str:
            raise ValueError(f"{values} are not a size and a SHA-256")
        return found

    def check(self, path: Path) -> None:
        """Raises UserError where the file is missing or of another size."""
        try:
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{FIELD}: {path} is missing ({error.strerror}); {AGAIN}") from error
        if size != self.size:
            raise UserError(
                f"{FIELD}: {path} has {size} bytes, the manifest says {self.size}; {AGAIN}"
            )

    def check_contents(self, path: Path) -> None:
        """Raises UserError where the file's bytes are others."""
        try:
            same = file_hash(path) == self.sha256
        except OSError as error:
            raise UserError(f"{FIELD}: cannot read {path}: {error.strerror or error}") from error
        if not same:
            raise UserError(f"{FIELD}: {path} changed since it was written; {AGAIN}")


@dataclass(frozen=True)
class TextShard:
    """The files of `count` captions with `rows` rows together, one of each of KINDS."""

    number: int
    count: int
    rows: int
    files: dict[str, Stored]

    @classmethod
    def parse(cls, values: Any) -> "TextShard":
        """What stands in a manifest or a record.

        Raises:
            ValueError, TypeError, KeyError: naming what is not as it should be.
        """
        files = {kind: Stored.parse(about) for kind, about in dict(values["files"]).items()}
        shard = cls(**(values | {"files": files}))
        for name, least in (("number", 0), ("count", 1), ("rows", 1)):
            value = getattr(shard, name)
            if type(value) is not int or value < least:
                raise ValueError(f"a shard's {name} {value!r} is not a whole number from {least}")
        if set(files) != set(KINDS):
            raise ValueError(f"shard {shard.number}: files are not {', '.join(KINDS)}")
        return shard

    def paths(self, folder: Path) -> list[tuple[Stored, Path]]:
        """What is known of each file, and where it is."""
        return [(self.files[kind], shard_path(folder, kind, self.number)) for kind in KINDS]


@dataclass(frozen=True)
class TextManifest:
    """What the rows of a text cache are.

    Attributes:
        facts: the encoder's.
        images: N.
        image_names: SHA-256 of the images' names, see `names_hash`.
        entries: M, captions of all images.
        captions: distinct ones.
        sources: names of the sources of captions.
        null_rows: rows of the empty caption.
        files: those of WHOLE.
        shards: in the order of the captions.
        version: of this contract.
    """

    facts: TextFacts
    images: int
    image_names: str
    entries: int
    captions: int
    sources: list[str]
    null_rows: int
    files: dict[str, Stored] = field(default_factory=dict)
    shards: list[TextShard] = field(default_factory=list)
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json, which turns `folder` into a cache."""
        with complete_file(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def stored(self, folder: Path) -> list[tuple[Stored, Path]]:
        """Every file of the cache but the manifest."""
        whole = [(self.files[name], folder / name) for name in WHOLE]
        return whole + [pair for shard in self.shards for pair in shard.paths(folder)]


def bytes_of(rows: int, facts: TextFacts) -> int:
    """Size of so many rows."""
    return rows * facts.hidden_size * getattr(torch, facts.dtype).itemsize


def read_manifest(folder: Path) -> TextManifest:
    """The manifest of a finished text cache.

    Raises:
        UserError: there is none, it is damaged, of another version, or of another kind of cache.
    """
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{FIELD}: {folder} is not a finished text cache ({MANIFEST} is missing); make it with "
            "main_cache.py --captions"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{FIELD}: cannot read {path}: {reason}") from error
    if isinstance(values, dict) and "latent_shape" in values:
        raise UserError(f"{FIELD}: {folder} is a cache of latents, not of captions")
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"{FIELD}: {path} has version {version!r}, this code reads {VERSION}; {AGAIN}"
        )
    try:
        return _parse(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{FIELD}: {path} is damaged: {error}; {AGAIN}") from error


def _parse(values: dict[str, Any]) -> TextManifest:
    parsed = {
        "facts": TextFacts.of(values["facts"]),
        "files": {name: Stored.parse(about) for name, about in values["files"].items()},
        "shards": [TextShard.parse(shard) for shard in values["shards"]],
    }
    manifest = TextManifest(**(values | parsed))
    for name in ("images", "entries", "captions", "null_rows"):
        value = getattr(manifest, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} {value!r} is not a whole number from 1")
    sources = manifest.sources
    if not isinstance(sources, list) or not all(type(source) is str for source in sources):
        raise ValueError(f"sources {sources!r} is not a list of str")
    if set(manifest.files) != set(WHOLE):
        raise ValueError(f"files are not {', '.join(WHOLE)}")
    _check_sizes(manifest)
    return manifest


def _check_sizes(manifest: TextManifest) -> None:
    """Entries that contradict each other; what a changed number would lead to is worse."""
    numbers = [shard.number for shard in manifest.shards]
    if numbers != list(range(len(numbers))):
        raise ValueError(f"numbers of shards {numbers} are not 0, 1, ...")
    total = sum(shard.count for shard in manifest.shards)
    if manifest.captions != total:
        raise ValueError(f"captions {manifest.captions} is not that of the shards, {total}")
    wanted = [("null.npy", manifest.files["null.npy"].size, manifest.null_rows)]
    for shard in manifest.shards:
        name = shard_path(Path(), "tokens", shard.number).name
        wanted.append((name, shard.files["tokens"].size, shard.rows))
    for name, size, rows in wanted:
        needed = HEADER + bytes_of(rows, manifest.facts)
        if size != needed:
            raise ValueError(
                f"{name} has {size} bytes, {rows} rows of {manifest.facts.hidden_size} in "
                f"{manifest.facts.dtype} need {needed}"
            )


def write_array(path: Path, values: np.ndarray) -> None:
    """A .npy file that appears when it is complete."""
    with complete_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, values)
