"""The one exception that means "the user can fix this", and how a command reports it."""

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """Bad input: the message names field, value and what is allowed, in one line."""


class ConfigError(UserError):
    """A refused configuration: the same on every process, so the first one alone reports it."""


def unknown_name(
    field: str, value: object, known: Iterable[str], error: type[UserError] = UserError
) -> UserError:
    """The error for a name that is not in a registry, with the list of those that are."""
    return error(f"{field}: unknown {value!r}; known: {', '.join(sorted(known))}")


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Make `main` end with one line and exit code 2 when the user can fix the cause."""

    @functools.wraps(main)
    def run(*args: object) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("diffmoe").setLevel(logging.INFO)
        try:
            main(*args)
        except UserError as error:
            if not isinstance(error, ConfigError) or os.environ.get("RANK", "0") == "0":
                sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
                sys.stderr.flush()
            sys.exit(2)

    return run
