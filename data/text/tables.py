"""Tables of captions: JSON lines and CSV, entry by entry, with the line that each stands on."""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from core.errors import ConfigError

FIELD = "data.captions"
SUFFIXES = (".jsonl", ".csv")
USUAL = ("text", "caption")
"""Keys of captions where none is named."""


def entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, entry) for each entry of a table; the place is file and line, for messages.

    Raises:
        ConfigError: the file cannot be read, is no UTF-8, or a line is damaged.
    """
    try:
        with path.open("rb") as file:
            yield from (_rows if path.suffix.lower() == ".csv" else _lines)(file, path)
    except OSError as error:
        raise ConfigError(f"{FIELD}: cannot read {path}: {error.strerror}") from error


def _decoded(lines: Iterable[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{FIELD}: {path} line {number}: not UTF-8") from error


def _lines(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict]]:
    for number, line in enumerate(_decoded(file, path), 1):
        place = f"{path} line {number}"
        if not line.strip():
            raise ConfigError(f"{FIELD}: {place}: empty; wanted: an entry in JSON")
        yield place, parse_entry(line, place)


def parse_entry(content: str | bytes, place: str) -> dict:
    """A mapping in JSON.

    Raises:
        ConfigError: it is something else.
    """
    try:
        entry = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{FIELD}: {place}: no JSON: {error}") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{FIELD}: {place}: no mapping of keys: {str(entry)[:60]}")
    return entry


def _rows(file: Iterable[bytes], path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(_decoded(file, path), strict=True)
    try:
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise ConfigError(
                    f"{FIELD}: {place}: not the {len(reader.fieldnames)} columns of the first line"
                )
            yield place, row
    except csv.Error as error:
        raise ConfigError(f"{FIELD}: {path} line {reader.reader.line_num}: {error}") from error


class Keys:
    """Where the image and the captions of an entry stand; decided by a table's first entry.

    Args:
        path_key: of the image.
        caption_keys: of the captions; none: one of USUAL. `a.b` is key b of the mapping at a, where
            no key is called so.
    """

    def __init__(self, path_key: str, caption_keys: tuple[str, ...]):
        self.path_key, self.caption_keys = path_key, caption_keys

    def path(self, entry: dict, place: str) -> str:
        """The image of an entry."""
        path = value_of(entry, self.path_key)
        if path is None:
            raise ConfigError(
                f"{FIELD}: {place}: no {self.path_key!r}, which should name the image; its keys: "
                f"{', '.join(map(str, entry))}; --path-key names another"
            )
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{FIELD}: {place}: {self.path_key!r} is no path: {path!r}")
        return path

    def captions(self, entry: dict, place: str) -> tuple[str, ...]:
        """The keys of an entry's captions."""
        if not self.caption_keys:
            self.caption_keys = tuple(key for key in USUAL if key in entry)[:1]
        if not self.caption_keys:
            raise ConfigError(
                f"{FIELD}: {place}: neither {' nor '.join(USUAL)}; its keys: "
                f"{', '.join(map(str, entry))}; --caption-key names one of them"
            )
        return self.caption_keys


def value_of(entry: dict, key: str) -> Any:
    """What stands at a key, or at `a.b` in the mapping at a; None if nothing does."""
    if key in entry or "." not in key:
        return entry.get(key)
    outer, _, inner = key.partition(".")
    below = entry.get(outer)
    return value_of(below, inner) if isinstance(below, dict) else None


def captions_of(entry: dict, keys: tuple[str, ...], place: str) -> list[tuple[str, str]]:
    """(caption, key) for each caption of an entry, a text or a list of them at each key.

    Raises:
        ConfigError: one is missing, empty or no text.
    """
    found = []
    for key in keys:
        value = value_of(entry, key)
        if value is None:
            raise ConfigError(
                f"{FIELD}: {place}: no caption at {key!r}; its keys: {', '.join(map(str, entry))}"
            )
        texts = value if isinstance(value, list) else [value]
        if not texts:
            raise ConfigError(f"{FIELD}: {place}: {key!r} is an empty list")
        found += [(_checked(text, key, place), key) for text in texts]
    return found


def _checked(text: Any, key: str, place: str) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{FIELD}: {place}: {key!r} is no text: {text!r}")
    if not text.strip():
        raise ConfigError(f"{FIELD}: {place}: {key!r} is an empty caption")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{FIELD}: {place}: {key!r} holds half of a character: {text!r}"
        ) from error
    return text.strip()
