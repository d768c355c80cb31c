"""Plain nested values, from files or flags, as the dataclasses of the schema, every one checked.

Supported types of keys: bool, int, float, str, literals, tuples, lists of str, dicts, and unions of
them.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, Union

import yaml

from config.files import chosen
from config.schema import CHOICES, Config
from core.errors import ConfigError


class Text(str):
    """A value as it was typed in a flag: what it means depends on the type of its key."""


class UnknownKeyError(ConfigError):
    """A key that the schema does not have.

    Attributes:
        path: of the key.
    """

    def __init__(self, path: str, known: list[str], chosen_name: str | None):
        self.path, self.known, self.chosen_name = path, known, chosen_name
        listed = f"known here: {', '.join(known)}"
        super().__init__(f"{path}: unknown key; {self.hint() or listed}")

    def hint(self, dashes: str = "") -> str:
        """What may be meant, the names of flags with `dashes`; nothing if nothing is near."""
        section, _, key = self.path.rpartition(".")
        others = [
            name
            for name, kind in CHOICES.get(section, {}).items()
            if key in {field.name for field in dataclasses.fields(kind)}
        ]
        if others:
            have = " or ".join(sorted(others))
            return f"{dashes}{section}.name {have} has it, not {self.chosen_name}"
        near = [f"{dashes}{path}" for path in _near(self.path, self.known)]
        return f"did you mean {' or '.join(near)}?" if near else ""


def _near(path: str, known: list[str]) -> list[str]:
    """The nearest key of this section, or the same one of others, or the nearest of all."""
    section, _, key = path.rpartition(".")
    paths = all_paths()
    same = [one for one in paths if one.rpartition(".")[2] == key]
    here = [f"{section}.{name}" if section else name for name in known]
    near = difflib.get_close_matches(path, here, n=1, cutoff=0.75) or same
    return near or difflib.get_close_matches(path, [*here, *paths], n=1, cutoff=0.75)


def all_paths(kind: type | None = None, at: str = "") -> list[str]:
    """Paths of every key that there is, whatever the names of sections."""
    found = []
    for one in CHOICES[at].values() if at in CHOICES else [kind or Config]:
        for name, hint in typing.get_type_hints(one).items():
            path = f"{at}.{name}" if at else name
            inside = path in CHOICES or dataclasses.is_dataclass(hint)
            found += all_paths(hint, path) if inside else [path]
    return list(dict.fromkeys(found))


def build(kind: type, values: Any, at: str = "") -> Any:
    """The dataclass `kind` of nested `values`, its own defaults where they say nothing.

    Args:
        kind: of the section.
        values: by key; strings of class Text are read by the type of their key.
        at: path of the section.

    Raises:
        ConfigError: for an unknown key, a wrong type, or a section that is none.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{at}: a section of keys is wanted here, not {values!r}")
    kinds = kinds_of(kind, at)
    made = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else str(key)
        if key not in kinds:
            raise UnknownKeyError(path, list(kinds), getattr(kind, "name", None))
        section = section_class(path, kinds[key], value)
        if section is not None:
            made[key] = build(section, value, path)
        else:
            made[key] = convert(value, kinds[key], path)
    return kind(**made)


def kinds_of(kind: type, at: str) -> dict[str, Any]:
    """The type of each key of a section; a `name` may be any of its alternatives."""
    hints = typing.get_type_hints(kind)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return kinds | {"name": Literal[tuple(CHOICES[at])]} if at in CHOICES else kinds


DEFAULTS = {"model.feed_forward": "diffmoe", "objective": "flow"}
"""Names of the sections that have several, where none is given."""


def section_class(path: str, kind: Any, values: Any) -> type | None:
    """The dataclass of the section at `path`, None for an ordinary key."""
    if path in CHOICES:
        named = isinstance(values, dict) and "name" in values
        return chosen(path, values["name"] if named else DEFAULTS[path])
    return kind if dataclasses.is_dataclass(kind) else None


def convert(value: Any, kind: Any, path: str) -> Any:
    """`value` as the type `kind` has it.

    Raises:
        ConfigError: naming `path`, the value and what is wanted.
    """
    given = value
    options = alternatives(kind)
    if isinstance(value, Text):
        parsed = _parsed(value)
        # A name such as 2024 or on stays what it is.
        plain = str in options and not (parsed is None or isinstance(parsed, list))
        value = str(value) if plain else parsed
    for option in options:
        fits, converted = _fits(value, option)
        if fits:
            return converted
    if value is None:
        raise ConfigError(f"{path}: null is not allowed; wanted: {describe(kind)}")
    shown = str(given) if isinstance(given, Text) else given
    raise ConfigError(f"{path}: {shown!r} is not allowed; wanted: {describe(kind)}")


def alternatives(kind: Any) -> list[Any]:
    """The members of a union, in their order; others alone."""
    if typing.get_origin(kind) in (Union, types.UnionType):
        return [option for part in typing.get_args(kind) for option in alternatives(part)]
    return [kind]


def describe(kind: Any) -> str:
    """A type in words: `int`, `'a' or 'b'`, `float, null`."""
    if kind is type(None):
        return "null"
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin is tuple and parts[-1] is Ellipsis:
        return f"[{describe(parts[0])}, ...]"
    if origin is dict:
        return f"{{{describe(parts[0])}: {describe(parts[1])}, ...}}"
    if origin in (tuple, list):
        return f"[{', '.join(map(describe, parts))}]"
    if len(alternatives(kind)) > 1:
        return ", ".join(map(describe, alternatives(kind)))
    return kind.__name__


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return str(text)


def _fits(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether `value` is of the type `kind`, and how that holds it."""
    if kind is type(None):
        return value is None, None
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts), value
    if origin is dict:
        return _fits_dict(value, parts)
    if origin in (tuple, list):
        return _fits_sequence(value, origin, parts)
    if kind is float:
        return _fits_float(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    return isinstance(value, kind), value


def _fits_float(value: Any) -> tuple[bool, Any]:
    """YAML takes 1e-4, without a point, for a string."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, value
    try:
        return True, float(value)
    except ValueError:
        return False, value


def _fits_dict(value: Any, parts: tuple) -> tuple[bool, Any]:
    if not isinstance(value, dict):
        return False, value
    found = [(_fits(key, parts[0]), _fits(item, parts[1])) for key, item in value.items()]
    fits = all(key[0] and item[0] for key, item in found)
    return fits, {key[1]: item[1] for key, item in found}


def _fits_sequence(value: Any, origin: type, parts: tuple) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    if origin is list or parts[-1] is Ellipsis:
        parts = (parts[0],) * len(value)
    found = [_fits(item, part) for item, part in zip(value, parts, strict=False)]
    fits = len(parts) == len(value) and all(ok for ok, _ in found)
    return fits, origin(item for _, item in found)
