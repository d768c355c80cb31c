"""`--help` of a command line whose flags are the keys of a config."""

import argparse
import dataclasses
import sys
from typing import Any

import docstring_parser

from config.sizes import SIZES
from config.typed import describe, kinds_of

CONFIG_HELP = "YAML file, or a name such as diffmoe/L_E16_flow; flags below override its keys"
SIZE_HELP = f"shorthand for hidden_size, depth and num_heads: {', '.join(SIZES)}"


def print_help(prog: str, config: Any) -> None:
    """Print one flag for each key of `config`, with its meaning and its value."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --config NAME [--KEY VALUE ...]",
        epilog="Keys are spelt as in the file, with underscores or hyphens.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=100),
    )
    add = parser.add_argument
    add("--config", metavar="FILE", help=CONFIG_HELP)
    add("--print_config", action="store_true", help="print the run and exit")
    add("--model.size", metavar="SIZE", help=SIZE_HELP)
    _add_section(parser, "", config)
    sys.stdout.write(parser.format_help())


def _add_section(parser: argparse.ArgumentParser, at: str, section: Any) -> None:
    title = docstring_parser.parse(type(section).__doc__).short_description
    group = parser.add_argument_group(f"{at or 'the run'} ({title.rstrip('.')})")
    helps, kinds = _field_docs(type(section)), kinds_of(type(section), at)
    for field in dataclasses.fields(section):
        path, value = f"{at}.{field.name}" if at else field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            _add_section(parser, path, value)
            continue
        wanted = describe(kinds[field.name]).replace("'", "")
        if "Literal" in str(kinds[field.name]):  # choices in braces, as argparse shows them
            wanted = f"{{{wanted.replace(', ', ',')}}}"
        default = f" ({value})" if value not in (None, "") else ""
        group.add_argument(
            f"--{path}", metavar=wanted, help=f"{helps[field.name]}{default}".replace("%", "%%")
        )


def _field_docs(kind: type) -> dict[str, str]:
    """What the docstrings of a dataclass and of those it extends say of each field."""
    docs = {}
    for base in reversed(kind.__mro__[:-1]):
        for param in docstring_parser.parse(base.__doc__).params:
            docs[param.arg_name] = " ".join(param.description.split())
    return docs
