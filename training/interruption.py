"""Requests to stop before the last step: a cluster takes the machine back, or Ctrl-C."""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from torch import nn

from core.distributed import Processes
from core.logging import get_logger

log: logging.Logger = get_logger("train")

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PAUSE = 2.0
"""Seconds within which the processes want to agree, as far as their steps are short."""

MOST_STEPS = 10
SAME = 1.0
"""Seconds in which a second Ctrl-C is the first: a terminal and torchrun both send it."""


class Stopped(Exception):  # noqa: N818  a request, not an error
    """Work that nobody waits for any more."""


class StopRequest:
    """Notices SIGTERM and Ctrl-C and lets all processes stop after the same step.

    A second Ctrl-C ends this process at once.

    Args:
        processes: all of which step together.
        timeout: seconds to wait for another one.

    Attributes:
        agreed: whether all processes know of a request.
        name: of the first signal that came.
    """

    def __init__(self, processes: Processes, timeout: float):
        self.processes = processes
        self.agreed = False
        self.name = "a signal"
        self.since: float | None = None
        self.next_look = 0
        self.last_look: tuple[int, float] | None = None
        # Hosts talk over gloo, so that no one waits for a GPU.
        wait = timedelta(seconds=timeout)
        gpus = processes.device.type == "cuda"
        several = processes.world_size > 1
        self.group = dist.new_group(backend="gloo", timeout=wait) if several and gpus else None

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return self.since is not None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note signals instead of dying from them, for the length of a block."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is not None:
            if number == signal.SIGINT and now - self.since > SAME:
                raise KeyboardInterrupt
            return
        self.since, self.name = now, signal.Signals(number).name
        if self.processes.is_main:
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            log.warning("%s: stopping after this step, with a checkpoint%s", self.name, hint)

    def due(self, step: int) -> bool:
        """Whether to stop after `step` steps; looked at every few steps, by all at the same ones.

        How few follows from the slowest process: about PAUSE seconds, at most MOST_STEPS.
        """
        if self.processes.world_size == 1:
            self.agreed = self.received
        elif step >= self.next_look:
            now, seconds = time.monotonic(), 0.0
            if self.last_look is not None:
                before, then = self.last_look
                seconds = (now - then) / max(1, step - before)
            self.last_look = step, now
            slowest = self._most(seconds)
            rest = MOST_STEPS if slowest == 0 else math.ceil(PAUSE / slowest)
            self.next_look = step + max(1, min(MOST_STEPS, rest))
        return self.agreed

    def ask_all(self) -> bool:
        """Whether any process was asked to stop; all processes call this."""
        if self.processes.world_size == 1:
            self.agreed = self.received
        else:
            self._most(0.0)
        return self.agreed

    def _most(self, value: float) -> float:
        """The largest `value` of all processes, and their requests on the way."""
        pair = torch.tensor([float(self.received), value], dtype=torch.float64)
        dist.all_reduce(pair, dist.ReduceOp.MAX, group=self.group)
        self.agreed = self.agreed or bool(pair[0])
        return float(pair[1])

    @contextmanager
    def interrupting(self, model: nn.Module, together: bool) -> Iterator[None]:
        """Break a block off at the next evaluation of `model` once a stop is asked for.

        Args:
            model: that the block evaluates.
            together: the processes evaluate it all at the same time, and break off so.
        """

        def look(*_: object) -> None:
            if self.ask_all() if together else self.received:
                raise Stopped

        handle = model.register_forward_pre_hook(look)
        try:
            with suppress(Stopped):
                yield
        finally:
            handle.remove()
