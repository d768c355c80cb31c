"""Where images of prompts are: sets of samples, folders in GenEval's layout, captioned images."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from core.errors import UserError
from data.images import SUFFIXES
from data.scenes import METADATA
from evaluations.features import image_batches, open_npz, read_image
from evaluations.json_lines import read_lines
from sampling.marks import check_file
from sampling.sets import Record, SetFolder, hashes_of, read_set

GENEVAL = "geneval"
"""In the folder of a set: the images in GenEval's layout, in place of the archive."""

Prompt = dict[str, object]
"""What is known of a prompt: its text as `prompt`, and perhaps what it asks for."""


@dataclass(frozen=True)
class Prompted:
    """Images and their prompts.

    Attributes:
        path: folder.
        prompts: one for each image.
        names: of the images.
        images: gives them one after the other, (H, W, 3) uint8.
        hashes: of checkpoint and set, where they are those of a set.
    """

    path: Path
    prompts: list[Prompt]
    names: list[str]
    images: Callable[[], Iterator[np.ndarray]]
    hashes: dict[str, str] = field(default_factory=dict)

    def batches(self, size: int) -> Iterator[tuple[range, list[np.ndarray]]]:
        """Up to `size` images at a time, after their indices."""
        images = self.images()
        for first in range(0, len(self.names), size):
            indices = range(first, min(first + size, len(self.names)))
            yield indices, list(islice(images, len(indices)))


def read_prompted(path: Path) -> Prompted:
    """The images of a folder.

    Args:
        path: folder of a set of samples by prompts, or its record; a folder in GenEval's layout,
            FOLDER/00000/metadata.jsonl and FOLDER/00000/samples/00000.png; or a folder of images
            with METADATA, whose lines have `file_name` and `text`.

    Raises:
        UserError: none of them, or one that is not complete.
    """
    if path.is_dir() and not SetFolder(path).record.is_file():
        if (path / METADATA).is_file():
            return _captioned(path)
        if _numbered(path):
            return _geneval(path, {})
        raise UserError(
            f"{path}: holds no images of prompts; wanted: a set of samples by prompts, folders "
            f"00000, 00001, ... as GenEval reads them, or images with {METADATA}"
        )
    return _set(path)


def _set(path: Path) -> Prompted:
    folder, record = read_set(path)
    hashes = hashes_of(record)
    prompts = _prompts(folder, record)
    kept = [place for place in (folder.archive, folder.images) if place.exists()]
    layout = folder.path / GENEVAL
    if not kept and layout.is_dir():
        found = replace(_geneval(layout, hashes), path=folder.path)
    elif not kept:
        raise UserError(f"{folder.path}: keeps no images; sample with --overwrite --save npz")
    elif kept[0] == folder.archive:
        check_file(folder.archive, record)
        with open_npz(folder.archive) as file:
            _, count = image_batches(file, folder.archive, 1)
        names = [f"{folder.archive}:{i:06d}" for i in range(count)]
        found = Prompted(folder.path, prompts, names, lambda: _rows(folder.archive), hashes)
    else:
        files = sorted(f for f in folder.images.iterdir() if f.suffix.lower() in SUFFIXES)
        found = _of_files(folder.path, prompts, files, hashes)
    if len(found.names) != len(prompts):
        raise UserError(
            f"{folder.path}: has {len(found.names)} images, its record {len(record['prompts'])} "
            f"prompts with {record['num_per_prompt']} each; sample with --overwrite"
        )
    return found


def _prompts(folder: SetFolder, record: Record) -> list[Prompt]:
    """The prompt of each image of a set."""
    if "prompts" not in record:
        raise UserError(f"{folder.record}: has no prompts, but classes; a set by prompts is wanted")
    prompts, each = record["prompts"], record.get("num_per_prompt")
    if not isinstance(prompts, list) or not prompts:
        raise UserError(f"{folder.record}: prompts: no list of prompts")
    if type(each) is not int or each < 1:
        raise UserError(f"{folder.record}: num_per_prompt: {each!r} is no whole number above 0")
    known = []
    for number, one in enumerate(prompts):
        entry = {"prompt": one} if isinstance(one, str) else one
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f"{folder.record}: prompts: number {number} has no text as `prompt`")
        known += [entry] * each
    return known


def _captioned(path: Path) -> Prompted:
    def read(entry: dict) -> tuple[Path, Prompt]:
        file, text = _text(entry, "file_name"), _text(entry, "text")
        if not (path / file).is_file():
            raise UserError(f"file_name: no file {path / file}")
        rest = {k: v for k, v in entry.items() if k not in ("file_name", "text")}
        return path / file, {"prompt": text} | rest

    files, prompts = zip(*read_lines(path / METADATA, "captions", read), strict=True)
    return _of_files(path, list(prompts), list(files), {})


def _geneval(path: Path, hashes: dict[str, str]) -> Prompted:
    def read(entry: dict) -> Prompt:
        _text(entry, "prompt")
        return entry

    prompts, files = [], []
    for folder in _numbered(path):
        entries = read_lines(folder / METADATA, "prompt", read)
        if len(entries) > 1:
            raise UserError(f"{folder / METADATA}: has {len(entries)} prompts; wanted: one")
        samples = folder / "samples"
        images = sorted(samples.iterdir()) if samples.is_dir() else []
        images = [file for file in images if re.fullmatch(r"\d+\.png", file.name)]
        if not images:
            raise UserError(f"{samples}: no images in it (00000.png, 00001.png, ...)")
        files += images
        prompts += entries * len(images)
    return _of_files(path, prompts, files, hashes)


def _numbered(path: Path) -> list[Path]:
    """Folders of prompts in GenEval's layout."""
    return sorted(place for place in path.iterdir() if place.name.isdigit() and place.is_dir())


def _text(entry: dict, name: str) -> str:
    if not isinstance(entry.get(name), str):
        raise UserError(f"has no {name}")
    return entry[name]


def _of_files(
    path: Path, prompts: list[Prompt], files: list[Path], hashes: dict[str, str]
) -> Prompted:
    images = functools.partial(map, read_image, files)
    return Prompted(path, prompts, [str(file) for file in files], images, hashes)


def _rows(archive: Path) -> Iterator[np.ndarray]:
    with open_npz(archive) as file:
        batches, _ = image_batches(file, archive, 64)
        for batch in batches:
            yield from batch
