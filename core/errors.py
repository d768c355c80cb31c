"""The one exception that means "the user can fix this", and how a command reports it."""

import functools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended."""

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""What torch says when memory is short."""


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
    """Make `main` end with one line and exit code 2 when the user can fix the cause.

    Under torchrun the line, or the traceback of what nobody expected, goes to the launcher as
    well, which repeats it at the end of its own report.
    """

    @functools.wraps(main)
    def run(*args: object) -> None:
        _log_to_stderr()
        try:
            main(*args)
        except BrokenPipeError:  # `| head` has seen enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nothing is left to be flushed
            sys.exit(1)
        except KeyboardInterrupt:
            _end("interrupted", INTERRUPTED)
        except Exception as error:
            line = one_line(error)
            if line is None:
                _tell_launcher(traceback.format_exc())
                if _has_others():
                    traceback.print_exc()
                    _leave(1)
                raise
            _end(f"error: {line}", 2, quiet=isinstance(error, ConfigError) and not _is_first())

    return run


def one_line(error: Exception) -> str | None:
    """One line for what the user can fix; None for anything else."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or any(sign in text for sign in NO_MEMORY):
        asked = text.partition("ried to allocate ")[2].split(". ")[0]
        return "not enough memory" + (f": {asked} were asked for at once" if asked else "")
    return None


def _end(line: str, code: int, quiet: bool = False) -> NoReturn:
    if not quiet:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    _tell_launcher(line)
    if _has_others():
        _leave(code)
    sys.exit(code)


def _has_others() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _leave(code: int) -> NoReturn:
    """End without a farewell to the other processes, which may wait for this one."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _tell_launcher(text: str) -> None:
    """Leave `text` where torchrun looks for the reason of a failure."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    about = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))
    except OSError:  # the launcher says less then
        return


class _Lines(logging.Handler):
    """Writes lines of the log to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    """Let the log of this process show messages alone, warnings of others included."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()])
    logging.getLogger("diffmoe").setLevel(logging.INFO)
