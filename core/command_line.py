"""Command lines: one form of program names, flags and errors for every program."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
        self.words: Sequence[str] = ()
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's; flags may be spelt with underscores."""
        words = sys.argv[1:] if args is None else args
        self.words = [hyphenated(str(word)) for word in words]
        return super().parse_known_args(self.words, namespace)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's; an unknown flag names the nearest known one."""
        flags, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return flags

    def refuse(self, unknown: Sequence[str]) -> None:
        """Refuse words that nobody knows, if there are any."""
        if unknown:
            word, near = unknown[0].partition("=")[0], self._nearest(unknown[0])
            self.error(f"{word}: unknown{f'; did you mean {near}?' if near else ''}")

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one line."""
        message = message.removeprefix("argument ")
        if "required" in message:  # what is missing may be there, misspelt
            message = next(filter(None, map(self._misspelt, self.words)), message)
        raise ConfigError(f"{message} ({self.prog} --help lists the flags)")

    def _misspelt(self, word: str) -> str | None:
        near = self._nearest(word) if word.startswith("--") and "." not in word else None
        return f"{word.partition('=')[0]}: unknown; did you mean {near}?" if near else None

    def _nearest(self, word: str) -> str | None:
        """The flag that a word is like, but not equal to."""
        word = word.partition("=")[0]
        if word in self._option_string_actions:
            return None
        return next(iter(difflib.get_close_matches(word, self._option_string_actions, n=1)), None)


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


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is too small; above 0 is allowed")
    return value


def not_negative(text: str) -> float:
    """A finite number, 0 or above."""
    value = _number(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is too small; 0 or above is allowed")
    return value


def file_to_write(text: str) -> Path:
    """A file that may be there or not, but is no folder, nor below a file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; a file is wanted")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {above} is no folder for it")
    return path


def folder(text: str) -> Path:
    """A folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def new_file(text: str) -> Path:
    """A file that is not there yet."""
    path = file_to_write(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f"{text} exists; remove it or choose another name")
    return path


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is too small; at least {least} is allowed")
    return value
