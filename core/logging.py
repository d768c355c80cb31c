"""Logging and progress of the main process; the other processes stay silent."""

import logging
from collections.abc import Iterable

from tqdm import tqdm

from core.distributed import Processes


def get_logger(name: str) -> logging.Logger:
    """The project's logger for module `name`."""
    return logging.getLogger(f"diffmoe.{name}")


def quiet_other_processes(processes: Processes) -> None:
    """Let only the main process log below the level of a warning."""
    if not processes.is_main:
        logging.getLogger("diffmoe").setLevel(logging.WARNING)


def progress(
    items: Iterable | None, processes: Processes, description: str, unit: str, **options
) -> tqdm:
    """A progress bar that only the main process shows."""
    return tqdm(
        items,
        desc=description,
        unit=unit,
        disable=not processes.is_main,
        dynamic_ncols=True,
        mininterval=1.0,
        **options,
    )
