"""From YAML files and flags to one checked `Config`.

`config.files` reads the files, `config.typed` checks every value; flags such as `--optim.lr 2e-4`
come last. Sections with a `name:` key (`model.feed_forward`, `objective`) get the dataclass of
that name.
"""

import copy
import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from config.files import find_config, merge, own_values, read_file, run_name
from config.help import print_help
from config.idle import changed, idle, leaves
from config.objective import SAMPLERS
from config.schema import CHOICES, Config
from config.sizes import SIZES
from config.typed import Text, UnknownKeyError, all_paths, build
from config.validate import validate
from core.errors import ConfigError, unknown_name


def parse_config(argv: list[str], prog: str, world_size: int | None = 1) -> Config:
    """The run that command line `argv` describes; exits after --help and --print_config.

    Raises:
        ConfigError: for anything that is unknown, of a wrong type or impossible.
    """
    flags = _read_flags(argv)
    path = None if flags.config is None else find_config(flags.config)
    raw = {} if path is None else read_file(path)
    alone = _from_file(Config, _expand_size(raw, None), path)
    for key, name in flags.names.items():
        raw = merge(raw, _nested(key, {"name": name}))
    raw = _expand_size(raw, flags.size)
    checked = _from_file(Config, raw, path)
    if flags.help:
        print_help(prog, checked)
        sys.exit(0)
    config = _finish(_with_flags(raw, flags.keys), default_run=run_name(path))
    validate(config, world_size)
    for key, needed in idle(config, flags.keys).items():
        raise ConfigError(f"--{key}: has no effect here; it needs {needed}")
    if path is not None:
        _check_file(path, alone, config)
    if flags.print_config:
        sys.stdout.write(dump_config(config))
        sys.exit(0)
    return config


def _check_file(path: Path, alone: Config, config: Config) -> None:
    """Refuse keys of a file that do nothing in it, and that no flag gives an effect either.

    Keys of its bases may serve other files, and the record of a run has all keys that there are.

    Args:
        path: of the file.
        alone: its config without flags.
        config: with flags.
    """
    own = own_values(path)
    if 2 * len(leaves(own)) > len(leaves(dataclasses.asdict(config))):
        return
    paths = changed(alone, own)
    found = idle(_finish(alone, default_run=""), paths)
    still = idle(config, paths)
    for key in found:
        if key in still:
            raise ConfigError(f"{path}: {key}: has no effect here; it needs {found[key]}")


def load_config(path: Path) -> Config:
    """The config in a YAML file alone, for instance the resolved one of a run."""
    raw = _expand_size(read_file(path), None)
    config = _finish(_from_file(Config, raw, path), default_run=run_name(path))
    validate(config, world_size=None)
    return config


def build_config(values: dict) -> Config:
    """The config of a record: plain nested values with every key resolved, as `to_plain` gives."""
    return _finish(build(Config, copy.deepcopy(values)), default_run="")


def typed_file(path: Path, kind: type) -> Any:
    """A YAML file as the dataclass `kind`, its own defaults where the file says nothing."""
    return _from_file(kind, read_file(path), path)


def dump_config(config: Config) -> str:
    """YAML text of a config, every key resolved; `load_config` reads it back."""
    return yaml.safe_dump(to_plain(dataclasses.asdict(config)), sort_keys=False)


@dataclass
class _Flags:
    """A command line.

    Attributes:
        config: file or name.
        size: that stands for three keys of the model.
        names: of the sections that have several, by path.
        keys: all other keys and their values, by path.
        help, print_config: asked for.
    """

    config: str | None = None
    size: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    keys: dict[str, Text] = field(default_factory=dict)
    help: bool = False
    print_config: bool = False


def _read_flags(argv: list[str]) -> _Flags:
    flags, words = _Flags(), iter(argv)
    for word in words:
        if not word.startswith("-"):
            raise ConfigError(f"{word}: unknown; a value follows its flag, as in --seed 1")
        flag, equals, value = word.partition("=")
        path = flag.lstrip("-").replace("-", "_")  # --init-from is --init_from
        if path in ("h", "help", "print_config"):
            setattr(flags, "help" if path == "h" else path, True)
            continue
        value = value if equals else next(words, None)
        if value is None:
            raise ConfigError(f"--{path}: a value is missing")
        if path == "config":
            flags.config = value
        elif path == "model.size":
            if value not in SIZES:
                raise unknown_name("--model.size", value, SIZES, ConfigError)
            flags.size = value
        elif path.removesuffix(".name") in CHOICES and path.endswith(".name"):
            flags.names[path.removesuffix(".name")] = value
        else:
            flags.keys[path] = Text(value)
    return flags


def _from_file(kind: type, raw: dict, path: Path | None) -> Any:
    """The dataclass of a file's values; what is wrong with them names the file."""
    try:
        return build(kind, raw)
    except ConfigError as error:
        raise ConfigError(str(error) if path is None else f"{path}: {error}") from None


NO_KEYS = ("config", "help", "print_config", "model.size")
"""Flags that are no keys of a config."""


def _with_flags(raw: dict, keys: dict[str, Text]) -> Config:
    """The config of a file's values with those of flags over them."""
    for path, value in keys.items():
        raw = merge(raw, _nested(path, value))
    try:
        return build(Config, raw)
    except UnknownKeyError as error:
        own = difflib.get_close_matches(error.path, NO_KEYS, n=1, cutoff=0.75)
        own = f"did you mean --{own[0]}?" if own else "--help lists the keys"
        hint = error.hint(dashes="--") or own
        raise ConfigError(f"--{error.path}: unknown key; {hint}") from None
    except ConfigError as error:
        section = next((p for p in keys if str(error).startswith(f"{p}: a section")), None)
        if section is not None:
            raise ConfigError(
                f"--{section}: is a section; give its keys, such as --{_a_key(section)}"
            ) from None
        raise


def _expand_size(raw: dict, flag: str | None) -> dict:
    """Put the numbers that `model.size` stands for in its place."""
    model = raw.get("model", {})
    if not isinstance(model, dict):
        return raw
    model = dict(model)
    size = model.pop("size", None)
    if size is not None:
        if not isinstance(size, str) or size not in SIZES:
            raise unknown_name("model.size", size, SIZES, ConfigError)
        model = SIZES[size] | model
    if flag is not None:
        model |= SIZES[flag]
    return raw | {"model": model}


def _finish(config: Config, default_run: str) -> Config:
    """Fill in the keys that follow from others."""
    if config.model.learn_sigma is None:
        config.model.learn_sigma = config.objective.name == "ddpm"
    if config.sampling.sampler is None:
        config.sampling.sampler = SAMPLERS[config.objective.name][0]
    config.optim.lr = config.optim.peak_lr(config.train.global_batch_size)
    if config.run_dir is None:
        config.run_dir = default_run
    return config


def _a_key(section: str) -> str:
    return next(path for path in all_paths() if path.startswith(f"{section}."))


def _nested(path: str, value: Any) -> dict:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def to_plain(value: Any) -> Any:
    """Nested dictionaries and lists, as YAML writes them."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value
