"""What a function tells on its way, as an iterator."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import Any

WAITING = 2
"""Items that the work is ahead of whoever looks at it."""


class _ClosedError(Exception):
    """Nobody looks any more."""


def streamed(work: Callable[[Callable[[Any], None]], Any]) -> Generator[Any, None, None]:
    """What `work` tells, from a thread of its own, and at last what it returns.

    Closing the iterator ends the work when it next tells something, and waits for that; an error of
    the work is raised by the iterator.

    Args:
        work: gets what it tells by.
    """
    ready: queue.Queue = queue.Queue(WAITING)
    closed, ended = threading.Event(), object()

    def tell(item: Any) -> None:
        if closed.is_set():
            raise _ClosedError
        ready.put((item, None))

    def run() -> None:
        try:
            tell(work(tell))
            ready.put((ended, None))
        except _ClosedError:
            pass
        except BaseException as error:
            ready.put((ended, error))

    worker = threading.Thread(target=run, name="sampling", daemon=True)
    worker.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is ended:
                return
            yield item
    finally:
        closed.set()
        while worker.is_alive():  # it may wait for room
            while not ready.empty():
                ready.get_nowait()
            worker.join(0.005)
