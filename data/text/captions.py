"""Which captions the images of a dataset have, and where each of them comes from.

Images are named by their paths below the image folder, as the `names` files of a latent cache name
them. Spaces around a caption do not count. Nothing is made up: an image without a caption, an empty
one and a damaged line are refused with file and line.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.errors import ConfigError
from core.logging import get_logger
from data.images import SUFFIXES, suffix_of
from data.tars import TAR, TarFiles, folder_of, tar_files
from data.text.tables import SUFFIXES as TABLES
from data.text.tables import Keys, captions_of, entries, parse_entry

KINDS = ("txt", "json", "metadata", "template")
"""Values of `--captions` besides the path of a table."""

FIELD = "data.captions"
BESIDE = ("txt", "json")
"""Kinds that are files beside the images: a caption on each line, or a mapping."""
METADATA = ("metadata.jsonl", "metadata.csv")

log = get_logger("data.text.captions")

Found = Iterator[list[tuple[str, str]]]
"""Of each image, in order, its (caption, source)."""


@dataclass(frozen=True)
class CaptionOptions:
    """Where captions are.

    Attributes:
        captions: one of KINDS, or the path of a .jsonl or .csv file with an entry for each image
            or each caption.
        data_path: image folder, or tar files, that names are relative to; None where there is none
            at hand.
        path_key: key of an entry's image, in a table.
        caption_keys: keys of its captions, each a source of its own; none: `text` or `caption`,
            whichever the first entry has.
        template: with `{}` where the name of an image's class folder goes.
    """

    captions: str
    data_path: str | None = None
    path_key: str = "file_name"
    caption_keys: tuple[str, ...] = ()
    template: str = "a photo of a {}"


class Captions:
    """The captions of a list of images, each text once.

    Args:
        found: of each image its (caption, source), at least one.

    Attributes:
        texts: distinct captions, in the order of their first appearance.
        sources: names of the sources, in the same order.
        offsets: (N + 1,) int64; image i has the entries offsets[i] ... offsets[i + 1].
        numbers: (M,) int64, places in `texts`.
        source_numbers: (M,) uint8, places in `sources`.
    """

    def __init__(self, found: Iterable[list[tuple[str, str]]]):
        texts: dict[str, int] = {}
        sources: dict[str, int] = {}
        offsets, numbers, source_numbers = [0], [], []
        for entry in found:
            for text, source in entry:
                numbers.append(texts.setdefault(text, len(texts)))
                source_numbers.append(sources.setdefault(source, len(sources)))
            offsets.append(len(numbers))
        self.texts, self.sources = list(texts), list(sources)
        self.offsets = np.array(offsets, dtype=np.int64)
        self.numbers = np.array(numbers, dtype=np.int64)
        self.source_numbers = np.array(source_numbers, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, image: int) -> list[tuple[str, str]]:
        """(caption, source) of an image."""
        entries = range(self.offsets[image], self.offsets[image + 1])
        return [
            (self.texts[self.numbers[n]], self.sources[self.source_numbers[n]]) for n in entries
        ]


def first_without(offsets: np.ndarray, sources: np.ndarray, wanted: Sequence[int]) -> int | None:
    """The first image without a caption of the `wanted` sources; None if there is none.

    Args:
        offsets: (N + 1,) of the images' entries, at least one each.
        sources: (M,) of the entries.
        wanted: numbers of sources.
    """
    found = np.logical_or.reduceat(np.isin(sources, wanted), offsets[:-1])
    return None if found.all() else int(found.argmin())


def read_captions(options: CaptionOptions, names: Sequence[str]) -> Captions:
    """The captions of images.

    Args:
        options: where they are.
        names: of the images, in order.

    Raises:
        ConfigError: naming file and line of what is missing, empty or damaged.
    """
    kind = options.captions
    if kind == "template":
        return Captions(_from_template(options.template, names))
    if kind in KINDS:
        if kind in BESIDE:
            return Captions(_beside(options, names))
        tables = _metadata(_root(options), names)
    else:
        if Path(kind).suffix.lower() not in TABLES:
            raise ConfigError(
                f"{FIELD}: unknown {kind!r}; allowed: {', '.join(KINDS)}, or the path of a "
                f"{' or '.join(TABLES)} file"
            )
        tables = [Path(kind)]
    return Captions(_from_tables(options, tables, names))


def _root(options: CaptionOptions) -> Path:
    if options.data_path is None:
        raise ConfigError(
            f"data.data_path: captions {options.captions!r} lie in the image folder, which is to "
            "be named"
        )
    return folder_of(options.data_path)


def _from_template(template: str, names: Sequence[str]) -> Found:
    before, hole, after = template.partition("{}")
    if not hole or "{" in before + after or "}" in before + after:
        raise ConfigError(
            f"{FIELD}_template: {template!r} needs one {{}} where the name of the class goes"
        )
    for name in names:
        folder, slash, _ = name.partition("/")
        if not slash or folder.lower().endswith(TAR):
            raise ConfigError(
                f"{FIELD}: {name} lies in no class folder, whose name a template needs"
            )
        yield [(f"{before}{folder.replace('_', ' ')}{after}".strip(), "template")]


def _beside(options: CaptionOptions, names: Sequence[str]) -> Found:
    """Captions of files of the images' names, in folders or in tar files."""
    kind, root = options.captions, _root(options)
    in_tars = tar_files(options.data_path)
    read = TarFiles(options.data_path).read if in_tars else lambda name: (root / name).read_bytes()
    keys = Keys(options.path_key, options.caption_keys)
    for name in names:
        stem = name[: -len(suffix_of(name))] if suffix_of(name) in SUFFIXES else name
        path = root / f"{stem}.{kind}"
        try:
            content = read(f"{stem}.{kind}")
        except FileNotFoundError:
            raise ConfigError(f"{FIELD}: {name} has no captions, {path} is missing") from None
        except OSError as error:
            raise ConfigError(f"{FIELD}: cannot read {path}: {error.strerror}") from error
        if kind == "txt":
            yield [(text, kind) for text in _lines(content, path)]
        else:
            entry = parse_entry(content, str(path))
            yield captions_of(entry, keys.captions(entry, str(path)), str(path))


def _lines(content: bytes, path: Path) -> list[str]:
    try:
        lines = content.decode("utf-8-sig").rstrip().split("\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{FIELD}: {path} line {line}: not UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ConfigError(f"{FIELD}: {path} line {number}: an empty caption")
    return [line.strip() for line in lines]


def _metadata(root: Path, names: Sequence[str]) -> list[Path]:
    """The METADATA files in the folders of the images, and above them up to `root`."""
    folders = {root}
    for name in names:
        folder = root / os.path.dirname(name)
        while folder not in folders:
            folders.add(folder)
            folder = folder.parent
    found = []
    for folder in sorted(folders):
        here = [folder / name for name in METADATA if (folder / name).is_file()]
        if len(here) > 1:
            raise ConfigError(f"{FIELD}: {here[0]} and {here[1].name} lie in the same folder")
        found += here
    if not found:
        raise ConfigError(f"{FIELD}: {root} has neither {' nor '.join(METADATA)}")
    return found


def _from_tables(options: CaptionOptions, tables: list[Path], names: Sequence[str]) -> Found:
    wanted = {name: number for number, name in enumerate(names)}
    found: list[list[tuple[str, str]]] = [[] for _ in names]
    others, first = 0, ""
    for table in tables:
        keys = Keys(options.path_key, options.caption_keys)
        name_of = _namer(table, options.data_path)
        for place, entry in entries(table):
            path = keys.path(entry, place)
            number = wanted.get(name_of(path))
            if number is None:
                others, first = others + 1, first or f"{path} ({place})"
            else:
                found[number] += captions_of(entry, keys.captions(entry, place), place)
    if others:
        log.info("%d entries are of images that are not there, first %s", others, first)
    lacking = [name for name, entry in zip(names, found, strict=True) if not entry]
    if lacking:
        raise ConfigError(
            f"{FIELD}: {len(lacking)} of {len(names)} images have no caption in "
            f"{', '.join(map(str, tables[:2]))}{', ...' * (len(tables) > 2)}, first {lacking[0]}"
        )
    yield from found


def _namer(table: Path, data_path: str | None) -> Callable[[str], str]:
    """What turns the paths of a table into what a cache calls its images.

    A table in the image folder, or below it, names images from where it lies, and so does
    metadata.jsonl anywhere; any other one from the image folder.
    """
    if data_path is None:
        return os.path.normpath
    root = os.path.abspath(folder_of(data_path))
    within = os.path.relpath(table.parent.absolute(), root)
    outside = within == ".." or within.startswith("../")
    from_table = table.name in METADATA or not outside

    def name(path: str) -> str:
        if os.path.isabs(path):
            return os.path.relpath(path, root)
        return os.path.normpath(os.path.join(within, path) if from_table else path)

    return name
