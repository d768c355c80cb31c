"""Files with a JSON object in each line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from core.errors import UserError

T = TypeVar("T")


def read_lines(path: Path, what: str, read: Callable[[dict], T]) -> list[T]:
    """What `read` makes of each line; empty ones are passed over.

    Args:
        path: of the file.
        what: it holds, for messages.
        read: takes a line's object; its errors get the name of the file and the line's number.

    Raises:
        UserError: naming file, line and what is wrong.
    """
    try:
        # Not splitlines, which takes characters within a JSON text for ends of lines.
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no {what}: byte {error.start} is no UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: no {what}: {error.strerror}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(read(_object(line)))
        except UserError as error:
            raise UserError(f"{path}: line {number}: {error}") from error
    if not found:
        raise UserError(f"{path}: no {what} in it; wanted: a JSON object in each line")
    return found


def _object(line: str) -> dict:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise UserError(f"is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"is no JSON object but {type(found).__name__}")
    return found
