"""python -m benchmarks.latent_loader [--images 20000] [--repeats 5] [--out FILE.json]

Samples per second in random order, shards of a cache against one published `.npz` for each image:
the bare gather, and batches ready to train on (posterior draw, scale, flip, float32), with 0 to 2
loader processes, from the page cache and from the disk; private memory of a loader process; and
the time to open a cache as large as ImageNet's. With --device cuda also batches that have arrived
on the GPU by way of pinned memory.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.measure import alternate, device_here, machine, report
from core.command_line import Parser, file_to_write, folder, positive
from core.errors import command
from data.dataset import LatentDataset
from data.latents import LatentCache, Moments
from data.manifest import MANIFEST, VIEWS, Manifest, Shard
from data.published import PublishedCache

SHAPE = (4, 32, 32)
"""Of ImageNet's latents at 256 x 256."""

IMAGENET = 1_281_167
FEW = 2048
"""Rows that are read from a cache that is not in memory, too few to bring in the rest of it."""
CPU = torch.device("cpu")
VAE = SimpleNamespace(path="none", scaling_factor=0.18215, shift_factor=0.0, latent_channels=4)


def manifest(shards: list[Shard]) -> Manifest:
    """Of synthetic latents, in float16."""
    count = sum(shard.count for shard in shards)
    facts = ("none", "none", VAE.scaling_factor, VAE.shift_factor, 256, "none", SHAPE, "float16")
    return Manifest(*facts, ["all"], count, shards)


def write(root: Path, images: int, shard_size: int) -> None:
    """The same synthetic moments as `shards/`, `npz/` (float32) and `st/`."""
    shards, draws = [], np.random.default_rng(0)
    (root / "npz" / "all").mkdir(parents=True)
    (root / "shards").mkdir()
    (root / "st").mkdir()
    for first in tqdm(range(0, images, shard_size), desc="writing", unit="shard"):
        indices = range(first, min(first + shard_size, images))
        size = (len(indices), VIEWS, 2 * SHAPE[0], *SHAPE[1:])
        moments = draws.standard_normal(size, dtype=np.float32)
        for index, (one, mirrored) in zip(indices, moments, strict=True):
            path = root / "npz" / "all" / f"{index:07d}.npz"
            np.savez(path, moments=one, moments_flip=mirrored)
        half = moments.astype(np.float16)
        labels, names = np.zeros(len(half), np.int64), [str(i) for i in indices]
        shards.append(Shard.write(root / "shards", len(shards), half, labels, names))
        save_file({"moments": half}, root / "st" / f"{len(shards) - 1:05d}.safetensors")
    manifest(shards).write(root / "shards")


class Slices:
    """Moments by slices that safetensors reads: the bare gather only."""

    def __init__(self, folder: Path, shard_size: int):
        files = sorted(folder.glob("*.safetensors"))
        self.slices = [safe_open(f, framework="pt").get_slice("moments") for f in files]
        self.size = shard_size

    def moments(self, indices: list[int], views: list[int]) -> Tensor:
        """Moments (B, 2C, h, w)."""
        pairs = zip(indices, views, strict=True)
        return torch.stack([self.slices[i // self.size][i % self.size, v] for i, v in pairs])


class Gather(Dataset):
    """Batches as they lie on the disk."""

    def __init__(self, source: Moments):
        self.source = source

    def __getitems__(self, items: list[tuple[int, int]]) -> Tensor:
        """Moments (B, 2C, h, w) of either view."""
        indices = [index for _, index in items]
        return self.source.moments(indices, [index & 1 for index in indices])


def as_it_is(batch: object) -> object:
    """The data sets gather whole batches themselves."""
    return batch


def batches(images: int, batch_size: int, count: int) -> list[list[tuple[int, int]]]:
    """Batches of (epoch, index) in random order, `count` samples in all."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))[:count]
    return [[(0, index) for index in part.tolist()] for part in order.split(batch_size)]


def read(data: Dataset, work: list, workers: int) -> Callable[[], None]:
    """A pass over `work`."""

    def go() -> None:
        if workers == 0:
            for items in work:
                data.__getitems__(items)
            return
        for _ in loader(data, work, workers):
            pass

    return go


def loader(data: Dataset, work: list, workers: int, pinned: bool = False) -> DataLoader:
    """As training has it."""
    return DataLoader(
        data,
        batch_sampler=work,
        num_workers=workers,
        collate_fn=as_it_is,
        pin_memory=pinned,
    )


def send(data: Dataset, work: list, workers: int, device: torch.device) -> Callable[[], None]:
    """A pass over `work` to the GPU."""

    def go() -> None:
        for latents, cond in loader(data, work, workers, pinned=True):
            latents.to(device, non_blocking=True)
            cond.to(device, non_blocking=True)

    return go


def evict(folder: Path) -> None:
    """Drop the files of `folder` from the page cache."""
    for path in folder.rglob("*.*"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def private_megabytes(pid: int | str = "self") -> float:
    """Memory of a process that is not pages of files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024


def worker_memory(data: Dataset, work: list) -> float:
    """Most private memory of one loader process in a pass, in MB beyond its parent's."""
    start, readings = private_megabytes(), []
    for _ in loader(data, work, 1):
        alive = multiprocessing.active_children()
        if alive:
            readings.append(private_megabytes(alive[0].pid))
    return max(readings) - start


def opening_seconds(root: Path, images: int, shard_size: int) -> float:
    """Time to open a cache of so many images whose files are empty but for their size."""
    folder = root / "huge"
    folder.mkdir()
    shards = []
    for first in range(0, images, shard_size):
        count, number = min(shard_size, images - first), len(shards)
        moments = 128 + manifest([]).bytes_of(count)
        sizes = {"moments": moments, "checks": 128 + 8 * count}
        sizes |= {"labels": 128 + 8 * count, "names": 20 * count}
        for kind, size in sizes.items():
            suffix = "txt" if kind == "names" else "npy"
            with (folder / f"{kind}-{number:05d}.{suffix}").open("wb") as file:
                file.truncate(size)
        shards.append(Shard(number, count, sizes, dict.fromkeys(sizes, "0" * 64)))
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest(shards))))
    times = []
    for _ in range(5):
        began = time.perf_counter()
        LatentCache(folder)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def table(root: Path, flags: argparse.Namespace) -> list[dict]:
    """A row for each way of reading."""
    cache = LatentCache(root / "shards")
    npz = PublishedCache(str(root / "npz"), "posterior", VAE)
    work = batches(flags.images, flags.batch_size, flags.images)
    few = batches(flags.images, flags.batch_size, max(flags.images // 5, flags.batch_size))
    rows = []
    for what, wrap in (("gather", Gather), ("ready", lambda source: LatentDataset(source, 0))):
        for workers in range(3):
            calls = {
                "shards": read(wrap(cache), work, workers),
                "npz": read(wrap(npz), few, workers),
            }
            counts = {"shards": work, "npz": few}
            if what == "gather" and workers == 0:
                calls["safetensors slices"] = read(
                    wrap(Slices(root / "st", flags.shard_size)), few, 0
                )
                counts["safetensors slices"] = few
            seconds = alternate(calls, flags.repeats, CPU)
            rates = {name: sum(map(len, counts[name])) / s for name, s in seconds.items()}
            for name, rate in rates.items():
                rows.append(
                    {"what": f"{what}, warm", "format": name, "workers": workers}
                    | {"samples/s": round(rate), "x npz": rate / rates["npz"]}
                )
    if flags.device != "cpu":
        rows += arriving(LatentDataset(cache, 0), work, flags)
    return rows + cold(root, few, flags)


def arriving(data: Dataset, work: list, flags: argparse.Namespace) -> list[dict]:
    """Rows of batches on the GPU."""
    device = torch.device(flags.device)
    calls = {str(workers): send(data, work, workers, device) for workers in range(3)}
    return [
        {"what": "on the GPU, warm", "format": "shards", "workers": int(workers)}
        | {"samples/s": round(sum(map(len, work)) / seconds), "x npz": ""}
        for workers, seconds in alternate(calls, flags.repeats, device).items()
    ]


def cold(root: Path, work: list, flags: argparse.Namespace) -> list[dict]:
    """Passes whose files are not in the page cache, by readers that are new each time."""
    opened = {
        "shards": lambda: LatentCache(root / "shards"),
        "npz": lambda: PublishedCache(str(root / "npz"), "posterior", VAE),
    }
    rows = []
    for workers in range(3):
        rates: dict[str, list[float]] = {name: [] for name in opened}
        for _ in range(flags.repeats):
            for name, build in opened.items():
                data = LatentDataset(build(), 0)
                evict(root / name)
                began = time.perf_counter()
                read(data, work, workers)()
                rates[name].append(sum(map(len, work)) / (time.perf_counter() - began))
        medians = {name: statistics.median(found) for name, found in rates.items()}
        rows += [
            {"what": "ready, cold", "format": name, "workers": workers}
            | {"samples/s": round(rate), "x npz": rate / medians["npz"]}
            for name, rate in medians.items()
        ]
    return rows


def scattered(root: Path, flags: argparse.Namespace) -> dict[str, float]:
    """Few rows of many from the disk: read one by one, or as the system reads ahead."""
    rates: dict[str, list[float]] = {"one by one": [], "read ahead": []}
    work = batches(flags.images, flags.batch_size, min(flags.images, FEW))
    for _ in range(flags.repeats):
        for name, found in rates.items():
            data = Gather(LatentCache(root / "shards", scattered=name == "one by one"))
            evict(root / "shards")
            began = time.perf_counter()
            read(data, work, 0)()
            found.append(sum(map(len, work)) / (time.perf_counter() - began))
    one, ahead = (statistics.median(found) for found in rates.values())
    return {
        f"cold rows/s, {FEW} one by one": one,
        f"cold rows/s, {FEW} as the system reads ahead": ahead,
        "ratio": one / ahead,
    }


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("benchmarks.latent_loader", __doc__)
    parser.add_argument("--device", type=device_here, default="cpu", help="where batches go")
    parser.add_argument("--images", type=positive, default=20_000, help="latents in the cache")
    parser.add_argument("--batch-size", type=positive, default=256, help="latents of a batch")
    parser.add_argument("--shard-size", type=positive, default=4096, help="images per file")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; the median counts")
    parser.add_argument("--dir", type=folder, help="where files are written; a temporary folder")
    parser.add_argument("--out", type=file_to_write, help="JSON file to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Measure and report."""
    flags = parse_flags(argv)
    torch.set_num_threads(1)  # as in a loader process
    with tempfile.TemporaryDirectory(dir=flags.dir) as name:
        root = Path(name)
        write(root, flags.images, flags.shard_size)
        rows = table(root, flags)
        work = batches(flags.images, flags.batch_size, flags.images)
        cache = LatentCache(root / "shards")
        facts = {
            "MB private in a loader process": worker_memory(LatentDataset(cache, 0), work),
            "s to open 1,281,167 images": opening_seconds(root, IMAGENET, flags.shard_size),
            **scattered(root, flags),
        }
    settings = vars(flags) | machine(torch.device(flags.device))
    settings = {key: str(value) for key, value in settings.items() if key not in ("out", "dir")}
    report(f"{flags.images} latents, batches of {flags.batch_size}", rows, settings, flags.out)
    report("", [{"": name, "value": value} for name, value in facts.items()], {}, None)
    if flags.out is not None:
        found = json.loads(flags.out.read_text())
        flags.out.write_text(json.dumps(found | {"facts": facts}, indent=2) + "\n")


if __name__ == "__main__":
    main()
