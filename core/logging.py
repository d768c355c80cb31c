"""Logging and progress of the main process; the other processes stay silent."""

import logging
import shutil
import sys
from collections.abc import Iterable

from tqdm import tqdm

from core.distributed import Processes

EVERY = 30.0
"""Seconds between two lines of progress where no terminal shows a bar."""


def get_logger(name: str) -> logging.Logger:
    """The project's logger for module `name`."""
    return logging.getLogger(f"diffmoe.{name}")


def quiet_other_processes(processes: Processes) -> None:
    """Let only the main process log below the level of a warning."""
    if not processes.is_main:
        logging.getLogger("diffmoe").setLevel(logging.WARNING)


def progress(
    items: Iterable | None, processes: Processes | None, description: str, unit: str, **options
) -> tqdm:
    """Progress that only the main process shows: a bar on a terminal, else a line at times."""
    terminal = sys.stderr.isatty()
    kind, pause = (tqdm, 1.0) if terminal else (_Lines, EVERY)
    return kind(
        items,
        desc=description,
        unit=unit,
        disable=processes is not None and not processes.is_main,
        dynamic_ncols=terminal and bool(shutil.get_terminal_size((80, 24)).columns),
        mininterval=pause,
        maxinterval=max(10.0, pause),
        **options,
    )


class _Lines(tqdm):
    """Progress in a file: whole lines, none before anything is done."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write where it stands."""
        if self.n > 0:
            self.fp.write(f"{msg or self}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """Lines stay."""

    def refresh(self, nolock: bool = False, lock_args: tuple | None = None) -> bool:
        """Write a line when it is time, not after every message of the log."""
        return nolock or super().refresh(nolock, lock_args)

    def set_postfix(self, ordered_dict: dict | None = None, refresh: bool = True, **kwargs) -> None:
        """For the next line."""
        super().set_postfix(ordered_dict, refresh=False, **kwargs)

    def close(self) -> None:
        """Write the last line, where one is to stay and it took longer than `delay`."""
        if self.disable:
            return
        if self.leave and self._time() >= self.start_t + self.delay:
            self.display()
        self.disable = True
        self._decr_instances(self)
