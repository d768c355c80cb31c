"""Where the time of a step goes."""

import time

import torch


class Clock:
    """Marks the phases of a step, on the device's own clock where it has one.

    Args:
        device: events of a GPU are read only by `read`, which waits for it.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step; what an earlier one left goes."""
        self.marks.clear()
        self.mark("start")

    def mark(self, phase: str) -> None:
        """`phase` ends here."""
        self.marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds of each phase of the last step."""
        if self.cuda:
            torch.cuda.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {phase: self._between(begin, end) for (_, begin), (phase, end) in pairs}

    def _now(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000 if self.cuda else end - begin
