"""Command lines: one form of program names, flags and errors for every program."""

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from core.errors import ConfigError, UserError


class Parser(argparse.ArgumentParser):
    """A parser whose flags are shown with hyphens and taken with underscores too.

    Args:
        program: `main_cache.py`, or a module such as `evaluations.capacity`.
        doc: the program's docstring, whose second paragraph says what it does, or that alone.
        options: of argparse's own.
    """

    def __init__(self, program: str, doc: str, **options: object):
        prog = program if program.endswith(".py") else f"python -m {program}"
        description = " ".join(doc.split("\n\n")[:2][-1].split())
        options = {"formatter_class": _Defaults} | options
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; flags may be spelt with underscores."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([hyphenated(str(word)) for word in words], namespace)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; an unknown flag names the nearest known one."""
        flags, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"{word}: unknown{hint}")
        return flags

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line."""
        raise ConfigError(
            f"{message.removeprefix('argument ')} ({self.prog} --help lists the flags)"
        )


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default where there is one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        silent = nothing or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


def hyphenated(word: str) -> str:
    """`--img_size=8` as `--img-size=8`; keys of a config, which have dots, stay as they are."""
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or "." in flag:
        return word
    return flag.replace("_", "-") + equals + value


@contextmanager
def as_flags(flags: dict[str, str]) -> Iterator[None]:
    """Errors about keys of a config name what the user typed instead.

    Args:
        flags: name of a flag by the key, which stands at the beginning of a message.
    """
    try:
        yield
    except UserError as error:
        key, colon, rest = str(error).partition(":")
        if key not in flags:
            raise
        raise type(error)(f"{flags[key]}{colon}{rest}") from error


def positive(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """A whole number, 0 or above."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least {least} is allowed")
    return value
