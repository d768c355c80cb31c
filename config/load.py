"""From YAML files and flags to one checked `Config`.

`config.files` reads the files; flags such as `--optim.lr 2e-4` come last. Sections with a `name:`
key (`model.feed_forward`, `objective`) get the dataclass of that name.
"""

import argparse
import copy
import dataclasses
import difflib
import re
import sys
import typing
from pathlib import Path
from typing import Any

import docstring_parser
import jsonargparse
import yaml

from config.files import chosen, find_config, merge, read_file, run_name
from config.objective import SAMPLERS
from config.schema import CHOICES, Config
from config.sizes import SIZES
from config.validate import validate
from core.errors import ConfigError, unknown_name

CONFIG_HELP = "YAML file, or a name such as diffmoe/L_E16_flow; flags below override its keys"
SIZE_HELP = f"shorthand for hidden_size, depth and num_heads: {', '.join(SIZES)}"


def parse_config(argv: list[str], prog: str, world_size: int | None = 1) -> Config:
    """The run that command line `argv` describes; exits after --help and --print_config.

    Raises:
        ConfigError: for anything that is unknown, of a wrong type or impossible.
    """
    argv = [_underscored(word) for word in argv]
    early = _early_flags(argv)
    path = None if early.config is None else find_config(early.config)
    raw = {} if path is None else read_file(path)
    for key, name in vars(early).items():
        if key in CHOICES:
            raw = merge(raw, _nested(key, {"name": name}))
    raw = _expand_size(raw, early.size)
    parser = _parser_with_defaults(prog, raw, path)
    flags = _call(parser.parse_args, [word for word in argv if word != "--print_config"])
    config = _finish(flags.as_dict(), default_run=run_name(path))
    validate(config, world_size)
    if early.print_config:
        sys.stdout.write(dump_config(config))
        sys.exit(0)
    return config


def load_config(path: Path) -> Config:
    """The config in a YAML file alone, for instance the resolved one of a run."""
    raw = _expand_size(read_file(path), None)
    parser = _parser_with_defaults("config", raw, path)
    config = _finish(parser.get_defaults().as_dict(), default_run=run_name(path))
    validate(config, world_size=None)
    return config


def build_config(values: dict) -> Config:
    """The config of a record: plain nested values with every key resolved, as `to_plain` gives."""
    return _finish(copy.deepcopy(values), default_run="")


def typed_file(path: Path, kind: type) -> Any:
    """A YAML file as the dataclass `kind`, its own defaults where the file says nothing."""
    raw = read_file(path)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    try:
        _add_section(parser, "", kind, raw)
        parser.set_defaults(_flat(_typed(parser, raw)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return _build("", kind, parser.get_defaults().as_dict())


def dump_config(config: Config) -> str:
    """YAML text of a config, every key resolved; `load_config` reads it back."""
    return yaml.safe_dump(to_plain(dataclasses.asdict(config)), sort_keys=False)


def _underscored(word: str) -> str:
    """`--init-from` is `--init_from`, as every flag may be spelt."""
    flag, equals, value = word.partition("=")
    return (
        flag.replace("-", "_").replace("__", "--", 1) + equals + value if word[:2] == "--" else word
    )


def _early_flags(argv: list[str]) -> argparse.Namespace:
    """The flags that decide which other flags there are."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    early.add_argument("--print_config", action="store_true")
    early.add_argument("--model.size", dest="size", choices=SIZES)
    for key in CHOICES:
        early.add_argument(f"--{key}.name", dest=key, default=argparse.SUPPRESS)
    return _call(early.parse_known_args, argv)[0]


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


def _parser_with_defaults(prog: str, raw: dict, source: Path | None) -> jsonargparse.ArgumentParser:
    """A parser whose defaults are the checked values of `raw`, read from the file `source`."""
    try:
        parser = _parser(prog, raw)
        parser.set_defaults(_flat(_typed(parser, raw)))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return parser


def _parser(prog: str, raw: dict) -> jsonargparse.ArgumentParser:
    """A parser with one flag for each key of the dataclasses that `raw` chooses."""
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --config NAME [--KEY VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=str,
        help="YAML file, or a name such as diffmoe/L_E16_flow; flags below override its keys",
    )
    parser.add_argument("--print_config", action="store_true", help="print the run and exit")
    parser.add_argument("--model.size", type=str, help=SIZE_HELP)
    _add_section(parser, "", Config, raw)
    return parser


def _add_section(parser: jsonargparse.ArgumentParser, at: str, kind: type, raw: Any) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{at}: a section of keys is wanted here, not {raw!r}")
    helps = _field_docs(kind)
    title = docstring_parser.parse(kind.__doc__).short_description
    group = parser.add_argument_group(f"{at or 'the run'} ({title.rstrip('.')})")
    types = typing.get_type_hints(kind)
    if at in CHOICES:
        types["name"] = typing.Literal[tuple(CHOICES[at])]
    fields = dataclasses.fields(kind)
    _check_keys(at, raw, [f.name for f in fields])
    for field in fields:
        path = f"{at}.{field.name}" if at else field.name
        section = _section_class(path, types[field.name], raw.get(field.name, {}))
        if section is not None:
            _add_section(parser, path, section, raw.get(field.name, {}))
        else:
            _check_null(path, raw, field.name, types[field.name])
            group.add_argument(
                f"--{path}",
                type=types[field.name],
                default=field.default,
                help=helps[field.name].replace("%", "%%"),
            )


def _field_docs(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it extends say of each field."""
    docs = {}
    for base in reversed(kind.__mro__[:-1]):
        for param in docstring_parser.parse(base.__doc__).params:
            docs[param.arg_name] = " ".join(param.description.split())
    return docs


def _section_class(path: str, kind: Any, raw: Any) -> type | None:
    """The dataclass of the section at `path`, None for an ordinary key."""
    if path in CHOICES:
        defaults = {"model.feed_forward": "diffmoe", "objective": "flow"}
        name = raw.get("name", defaults[path]) if isinstance(raw, dict) else defaults[path]
        return chosen(path, name)
    return kind if dataclasses.is_dataclass(kind) else None


def _check_keys(at: str, raw: dict, known: list[str]) -> None:
    for key in raw:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            path = f"{at}.{key}" if at else str(key)
            raise ConfigError(f"{path}: unknown key; {hint}known here: {', '.join(known)}")


def _check_null(path: str, raw: dict, key: str, kind: Any) -> None:
    """The parser takes null for any default; a key that means nothing without a value must not."""
    if key in raw and raw[key] is None and type(None) not in typing.get_args(kind):
        raise ConfigError(f"{path}: null is not allowed; wanted: {getattr(kind, '__name__', kind)}")


def _typed(parser: jsonargparse.ArgumentParser, raw: dict) -> dict:
    """`raw` with every value checked against, and converted to, the type of its key."""
    try:
        return parser.parse_object(raw, defaults=False).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_tidy(error)) from None


def _call(parse: Any, argv: list[str]) -> Any:
    try:
        return parse(argv)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(_tidy(error)) from None


def _tidy(error: Exception) -> str:
    """The parser's message as `key: wanted ..., got ...`."""
    text = " ".join(str(error).split())
    one = r"Expected an? (?P<kind>.+?)\. Got value: (?P<value>.*)$"
    several = r"Does not .*?Subtypes: \[(?P<kind>.*?)\] Errors: .*Given value: (?P<value>.*)$"
    for pattern in (one, several):
        found = re.match(rf'Parser key "(?P<key>.+?)": {pattern}', text)
        if found:
            wanted = re.sub(r"<class '(\w+)'>", r"\1", found["kind"].replace("typing.", ""))
            wanted = wanted.replace("NoneType", "null")
            return f"{found['key']}: {found['value']!r} is not allowed; wanted: {wanted}"
    return text


def _finish(values: dict, default_run: str) -> Config:
    """Dataclasses from checked values, with the keys filled in that follow from others."""
    for extra in ("config", "print_config"):
        values.pop(extra, None)
    values["model"].pop("size", None)
    config = _build("", Config, values)
    if config.model.learn_sigma is None:
        config.model.learn_sigma = config.objective.name == "ddpm"
    if config.sampling.sampler is None:
        config.sampling.sampler = SAMPLERS[config.objective.name][0]
    config.optim.lr = config.optim.peak_lr(config.train.global_batch_size)
    if config.run_dir is None:
        config.run_dir = default_run
    return config


def _build(at: str, kind: type, values: dict) -> Any:
    types = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else key
        section = _section_class(path, types[key], value)
        made[key] = _build(path, section, value) if section is not None else value
    return kind(**made)


def _nested(path: str, value: Any) -> dict:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _flat(values: dict, at: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else key
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat


def to_plain(value: Any) -> Any:
    """Nested dictionaries and lists, as YAML writes them."""
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value
