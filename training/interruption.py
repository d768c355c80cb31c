"""Reasons to stop before the last step: a cluster takes the machine back, or something hangs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from core.distributed import Processes


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
