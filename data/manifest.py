"""The cache of VAE latents: what lies on the disk.

A cache is a folder with `manifest.json` and numbered files of a fixed number of images each:

    moments-00000.npy   (n, V, 2C, h, w) float16, float32, or bfloat16 as uint16
    checks-00000.npy    (n, V) uint32, CRC-32 of each (2C, h, w) above
    labels-00000.npy    (n,) int64
    names-00000.txt     n lines, the images' paths below the folder that they came from

The second axis holds the views of an image, as it is and, where V is 2, mirrored (encoded from the
mirrored image); 2C are the C channels of the posterior's mean, then the C of its log-variance,
neither shifted nor scaled. The manifest is written last: a folder without it is not a cache.

Files are .npy, which anything reads. Mapped into memory, .npy and safetensors are the same bytes
behind a header; slices that safetensors reads itself, row by row, come a sixth as fast
(`python -m benchmarks.latent_loader`).

Shapes: V views, C latent channels, h and w height and width of the latent.
"""

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.errors import UserError
from core.files import complete_file, file_hash

VERSION = 2
VIEWS = 2
"""Of an image that is mirrored half of the time; without mirroring, a cache may hold one alone."""
DTYPES = ("float16", "bfloat16", "float32")
MANIFEST = "manifest.json"
KINDS = {"moments": "npy", "checks": "npy", "labels": "npy", "names": "txt"}


def shard_path(folder: Path, kind: str, number: int) -> Path:
    """One file of a shard; `kind` is one of KINDS."""
    return folder / f"{kind}-{number:05d}.{KINDS[kind]}"


def stored_dtype(dtype: str) -> np.dtype:
    """What numpy sees in a moments file: it has no bfloat16."""
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


@dataclass(frozen=True)
class Shard:
    """The files of `count` images, with the size in bytes and the SHA-256 of each kind."""

    number: int
    count: int
    sizes: dict[str, int]
    sha256: dict[str, str]

    @classmethod
    def write(
        cls, folder: Path, number: int, moments: np.ndarray, labels: np.ndarray, names: list[str]
    ) -> "Shard":
        """Write the files and describe them.

        Args:
            folder: of the cache.
            number: of the shard.
            moments: (n, V, 2C, h, w), of a `stored_dtype`.
            labels: (n,) int64.
            names: n paths.
        """
        checks = np.array(
            [[zlib.crc32(np.ascontiguousarray(view)) for view in image] for image in moments],
            dtype=np.uint32,
        ).reshape(moments.shape[:2])
        for kind, values in (("moments", moments), ("checks", checks), ("labels", labels)):
            path = shard_path(folder, kind, number)
            with complete_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, values)
        with complete_file(shard_path(folder, "names", number)) as temporary:
            lines = [name.replace("\n", "\\n") + "\n" for name in names]
            # Names that are not UTF-8 pass as the bytes that they are.
            temporary.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
        paths = {kind: shard_path(folder, kind, number) for kind in KINDS}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        hashes = {kind: file_hash(path) for kind, path in paths.items()}
        return cls(number, len(labels), sizes, hashes)

    @classmethod
    def of(cls, values: Any) -> "Shard":
        """What stands in a manifest.

        Raises:
            ValueError: naming an entry that is not what it should be.
            TypeError, KeyError: an entry is missing, or there is one too many.
        """
        shard = cls(**values)
        for name, least in (("number", 0), ("count", 0)):
            value = getattr(shard, name)
            if type(value) is not int or value < least:
                raise ValueError(f"a shard's {name} {value!r} is not a whole number")
        for name, kind in (("sizes", int), ("sha256", str)):
            entries = getattr(shard, name)
            if not isinstance(entries, dict) or set(entries) != set(KINDS):
                raise ValueError(f"shard {shard.number}: {name} does not name {', '.join(KINDS)}")
            if any(type(value) is not kind for value in entries.values()):
                raise ValueError(f"shard {shard.number}: {name} {entries} are not {kind.__name__}")
        return shard

    def check(self, folder: Path) -> None:
        """Compare the files' sizes with this description.

        Raises:
            UserError: naming the file that is missing or truncated.
        """
        for kind, expected in self.sizes.items():
            path = shard_path(folder, kind, self.number)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise UserError(
                    f"data.cached_path: {path} is missing ({error.strerror}); make the cache again"
                ) from error
            if size != expected:
                raise UserError(
                    f"data.cached_path: {path} has {size} bytes, the manifest says {expected}; "
                    "make the cache again"
                )

    def check_contents(self, folder: Path, kind: str) -> None:
        """Compare the bytes of one file with its SHA-256.

        Raises:
            UserError: naming a file that changed.
        """
        path = shard_path(folder, kind, self.number)
        try:
            same = file_hash(path) == self.sha256[kind]
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"data.cached_path: cannot read {path}: {reason}") from error
        if not same:
            raise UserError(
                f"data.cached_path: {path} changed since it was written; make the cache again"
            )


@dataclass(frozen=True)
class Manifest:
    """What the numbers of a cache are.

    Attributes:
        vae_path: hub id or folder of the VAE.
        vae_hash: of its weights, see `data.vae.VAE.weights_hash`.
        scaling_factor: a model sees (z - shift_factor) * scaling_factor.
        shift_factor: see there.
        image_size: side of the cropped images, in pixels.
        crop: name of the crop rule.
        latent_shape: [C, h, w].
        dtype: of the moments, one of DTYPES.
        class_names: name of each label.
        count: images.
        shards: files, in the order of the images.
        views: V, one of 1 and VIEWS.
        version: of this contract.
    """

    vae_path: str
    vae_hash: str
    scaling_factor: float
    shift_factor: float
    image_size: int
    crop: str
    latent_shape: tuple[int, int, int]
    dtype: str
    class_names: list[str]
    count: int = 0
    shards: list[Shard] = field(default_factory=list)
    views: int = VIEWS
    version: int = VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json, which turns `folder` into a cache."""
        with complete_file(folder / MANIFEST) as path:
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    def bytes_of(self, images: int) -> int:
        """Size of the moments of so many images."""
        values = images * self.views * 2 * int(np.prod(self.latent_shape))
        return values * getattr(torch, self.dtype).itemsize


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
            f"data.cached_path: {folder} is not a finished cache ({MANIFEST} is missing); "
            "make it with main_cache.py"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.cached_path: cannot read {path}: {reason}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"data.cached_path: {path} has version {version!r}, this code reads {VERSION}; "
            "make the cache again with main_cache.py"
        )
    try:
        shards = [Shard.of(shard) for shard in values.pop("shards")]
        manifest = Manifest(**values, shards=shards)
        _check(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"data.cached_path: {path} is damaged: {error}; make the cache again"
        ) from error
    return manifest


def _check_types(manifest: Manifest) -> None:
    kinds = {
        **dict.fromkeys(("vae_path", "vae_hash", "crop", "dtype"), (str,)),
        **dict.fromkeys(("image_size", "count", "views"), (int,)),
        **dict.fromkeys(("scaling_factor", "shift_factor"), (int, float)),
    }
    for name, allowed in kinds.items():
        value = getattr(manifest, name)
        if type(value) not in allowed:  # a bool is an int to isinstance
            raise ValueError(f"{name} {value!r} is not {allowed[-1].__name__}")
    for name, kind in (("latent_shape", int), ("class_names", str)):
        values = getattr(manifest, name)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise ValueError(f"{name} {values!r} is not a list of {kind.__name__}")


def _check(manifest: Manifest) -> None:
    """Entries that contradict each other; what a changed number would lead to is worse.

    Raises:
        ValueError: naming the entry.
    """
    _check_types(manifest)
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
    if not 1 <= manifest.views <= VIEWS:
        raise ValueError(f"views {manifest.views} is neither 1 nor {VIEWS}")
    if len(manifest.latent_shape) != 3 or min(manifest.latent_shape) < 1:
        raise ValueError(f"latent_shape {manifest.latent_shape} is not [C, h, w]")
    if not 0 < manifest.scaling_factor < math.inf:
        raise ValueError(f"scaling_factor {manifest.scaling_factor} is not above 0")
    if not math.isfinite(manifest.shift_factor):
        raise ValueError(f"shift_factor {manifest.shift_factor} is not finite")
    numbers = [shard.number for shard in manifest.shards]
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"numbers of shards {numbers} are not all different")
    total = sum(shard.count for shard in manifest.shards)
    if manifest.count != total:
        raise ValueError(f"count {manifest.count} is not that of the shards, {total}")
    for shard in manifest.shards:
        least = manifest.bytes_of(shard.count)
        if not least < shard.sizes["moments"] <= least + 4096:
            raise ValueError(
                f"shard {shard.number} has {shard.sizes['moments']} bytes of moments, "
                f"{shard.count} images of {manifest.latent_shape} in {manifest.dtype} need {least}"
            )
