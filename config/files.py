"""The YAML files: finding them by name, and reading them merged over their `base:` files.

A file may name another as its `base:` and then holds its differences only. When the `name:` of a
section changes, keys that the new one does not have are dropped from what stood below, so that
`--model.feed_forward.name dense` works on any file.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.schema import CHOICES
from config.yaml_files import read_yaml
from core.errors import ConfigError, unknown_name

FOLDER = Path(__file__).resolve().parent
NOT_RUNS = ("imagenet256", "text256", "protocols")
"""Common ground of a family's runs, and the folder of evaluations: no runs by themselves."""


def known_configs() -> list[str]:
    """Names of the runs that come with the project: `diffmoe/L_E16_flow`, `quickstart`."""
    names = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    return sorted(name.as_posix() for name in names if not set(name.parts) & set(NOT_RUNS))


def find_config(name: str, field: str = "--config", folder: Path = Path()) -> Path:
    """The file `name` in `folder`, or the project's own config, with or without `.yaml`.

    Raises:
        ConfigError: there is neither; names that are near are listed.
    """
    bare = name.removesuffix(".yaml")
    for path in (folder / name, folder / f"{bare}.yaml", FOLDER / f"{bare}.yaml"):
        if bare and path.is_file():
            return path
    raise ConfigError(f"{field}: {_instead(name, '/'.join(Path(bare).parts), folder)}")


def _instead(name: str, bare: str, folder: Path) -> str:
    """What is wrong with a name that no config has, and the names that may be meant."""
    known = known_configs()
    wanted = bare.removeprefix("config/")
    inside = [one for one in known if one.startswith(f"{wanted}/")] if wanted else []
    if inside or (name and (folder / name).is_dir()):
        some = f"; configs in it: {_some(inside)}" if inside else ""
        return f"{name} is a folder, not a file{some}"
    renamed = _renamed(wanted, known)
    if renamed is not None:
        return f"no file {name}, and no config of that name; it is now {renamed}"
    tail = "/".join(wanted.split("/")[-2:])
    near = _alike(wanted.split("/")[-1]) or difflib.get_close_matches(tail, known, n=4, cutoff=0.5)
    listed = f"near it: {', '.join(near)}" if near else f"there are such as {_some(FIRST)}"
    return f"no file {name or repr(name)}, and no config of that name; {listed}"


def _alike(last: str) -> list[str]:
    """Configs whose name ends so, whatever their folder."""
    found = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.yaml"))
    return sorted(path.as_posix() for path in found if path.name == last and len(path.parts) == 2)


FIRST = ("000_DiffMoE_S_E16_Flow", "diffmoe/L_E16_flow", "dit/XL_flow", "quickstart", "...")
"""Names to begin with."""


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:6], *(["..."] if len(names) > 6 else [])])


def _renamed(name: str, known: Sequence[str]) -> str | None:
    """What replaces a name of version 0.1, such as `dit_S_ddpm` and `imagenet256_jit`."""
    family, _, rest = name.partition("_")
    if family == "imagenet256" and rest:
        return f"{rest}/{family}" if (FOLDER / rest / f"{family}.yaml").is_file() else None
    now = f"{family.removesuffix('moe') if family == 'jitmoe' else family}/{rest}"
    if now in known:
        return now
    flow = f"{now.removesuffix('_ddpm')}_flow"
    return f"{flow} with --objective.name ddpm" if now != flow and flow in known else None


def run_name(path: Path | None) -> str:
    """The run folder of a config that names none: `runs/diffmoe_L_E16_flow`."""
    if path is None:
        return "runs/default"
    path = path.resolve()
    own = path.is_relative_to(FOLDER)
    parts = (path.relative_to(FOLDER) if own else Path(path.name)).with_suffix("").parts
    return f"runs/{'_'.join(parts)}"


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """A YAML file merged over its `base:` files, as plain nested dictionaries."""
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: base: files form a circle")
    raw = own_values(path)
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be one file or name, not {base!r}")
    below = find_config(base, f"{path}: base", path.parent)
    return merge(read_file(below, (*seen, path)), raw)


def own_values(path: Path) -> dict:
    """What stands in a YAML file itself, its `base:` included."""
    raw = read_yaml(path)
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys, not {type(raw).__name__}")
    return raw


def merge(below: dict, above: dict, at: str = "") -> dict:
    """`above` over `below`, section by section; see the top of this file for `name:`."""
    merged = dict(below)
    if at in CHOICES and "name" in above and above["name"] != below.get("name"):
        choice = chosen(at, above["name"])
        known_before = {f.name for c in CHOICES[at].values() for f in dataclasses.fields(c)}
        kept = {f.name for f in dataclasses.fields(choice)}
        merged = {k: v for k, v in below.items() if k in kept or k not in known_before}
    for key, value in above.items():
        old = merged.get(key)
        path = f"{at}.{key}" if at else str(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        merged[key] = merge(old, value, path) if both else value
    return merged


def chosen(section: str, name: Any) -> type:
    """The dataclass of a section whose `name:` is `name`."""
    try:
        return CHOICES[section][name]
    except (KeyError, TypeError):
        raise unknown_name(f"{section}.name", name, CHOICES[section], ConfigError) from None
