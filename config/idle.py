"""Keys that do nothing where another key stands against them.

Whoever sets one expects something of it, so it is refused instead of passed over: as a flag in any
case, and in a file where the file itself leaves it without effect.
"""

from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from config.needs import NEEDS
from config.schema import Config


def idle(config: Config, paths: Iterable[str]) -> dict[str, str]:
    """Those of `paths` that have no effect in `config`, and what they need.

    Args:
        config: with every default filled in.
        paths: of keys; a null says that there is nothing, and so is never idle.
    """
    found = {}
    for need in NEEDS:
        for path in set(need.paths()).intersection(paths):
            if value_at(config, path) is not None and not need.met(config):
                found[path] = need.words
    return {path: found[path] for path in paths if path in found}


def value_at(config: Any, path: str) -> Any:
    """The value of a key; None where its section has no such key."""
    for key in path.split("."):
        config = getattr(config, key, None)
    return config


def changed(config: Config, values: dict) -> list[str]:
    """Paths of those of a file's `values` that differ from the defaults of their sections."""
    return [path for path in leaves(values) if value_at(config, path) != _default(config, path)]


def leaves(values: dict, at: str = "") -> list[str]:
    """Paths of all keys in nested values."""
    found = []
    for key, value in values.items():
        path = f"{at}.{key}" if at else str(key)
        found += leaves(value, path) if isinstance(value, dict) else [path]
    return found


def _default(config: Config, path: str) -> Any:
    section, _, key = path.rpartition(".")
    holder = value_at(config, section) if section else config
    if not is_dataclass(holder):
        return None
    field = next((field for field in fields(holder) if field.name == key), None)
    if field is None:
        return None
    return field.default_factory() if field.default is MISSING else field.default
