"""Reasons to stop before the last step: a cluster takes the machine back, or something hangs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from core.distributed import Processes
from core.errors import UserError

LOST = ("timed out", "Connection closed by peer", "Connection reset", "exited unexpectedly")


class StopRequest:
    """Notices SIGTERM and lets all processes stop after the same step."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self.received = False
        # Hosts talk over gloo, so that no one waits for a GPU.
        gpus = processes.device.type == "cuda"
        several = processes.world_size > 1
        self.group = dist.new_group(backend="gloo") if several and gpus else None

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Note SIGTERM instead of dying from it, for the length of a block."""
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def agreed(self) -> bool:
        """Whether any process was asked to stop; every process gets the same answer."""
        if self.processes.world_size == 1:
            return self.received
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


@contextmanager
def losses_named() -> Iterator[None]:
    """One line for a loader worker or another process that died or does not answer."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if not isinstance(error, UserError) and any(sign in text for sign in LOST):
            raise UserError(
                "a data worker or another process of this run died or does not answer "
                f"(train.timeout): {text[:200]}; --resume auto goes on from the last checkpoint"
            ) from error
        raise
