"""Processes that read data for another one: what they obey, and what is said when they are lost."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from core.distributed import LOST
from core.errors import UserError
from core.heap import keep_freed_memory


def steady(number: int) -> None:
    """Let only the parent end this process, and give memory back: every loader's `worker_init_fn`.

    Ctrl-C in a terminal reaches all processes of a job, and so does the SIGTERM of many
    schedulers. A reader that died of them would take the training process with it while that is
    still saving.

    Args:
        number: of the worker; the same is done in all.
    """
    # Batches come and go here in many sizes, and what they leave would pile up.
    keep_freed_memory(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    # Threads that start later inherit the mask, so that the signal waits for `_obey_parent`.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while True:
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == os.getppid():
            os._exit(0)  # as torch's own handler: what the parent ends has not failed


def next_of(arriving: Iterator, reading: str, kept: str) -> Any:
    """What a loader gives next.

    Args:
        arriving: of the loader.
        reading: what it is asked for, to the user.
        kept: what stays when it fails, and how to go on.

    Raises:
        UserError: the process that reads it died, or did not answer in time.
    """
    try:
        return next(arriving)
    except (RuntimeError, OSError, EOFError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        lost = not isinstance(error, RuntimeError) or any(sign in text.lower() for sign in LOST)
        if not lost or text.startswith("Caught "):  # the reading code's own error
            raise
        raise UserError(
            f"--num-workers: a reading process died or does not answer, at {reading}: "
            f"{text[:200].rstrip(' .')}; {kept}; --timeout SECONDS waits longer, --num-workers 0 "
            "reads without such processes"
        ) from error
