"""A trace of a few steps, and what memory was used for in them, on request."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from config.schema import Config
from core.distributed import Processes
from core.logging import get_logger

FOLDER = "profile"
log: logging.Logger = get_logger("profiling")


class Profiler:
    """Records steps `train.profile_steps` of the main process into <run_dir>/profile.

    `trace_step_<first>.json.gz` opens in https://ui.perfetto.dev or chrome://tracing; on GPUs
    `memory_step_<first>.pickle` opens in https://pytorch.org/memory_viz.

    Args:
        config: of the run.
        processes: the main one is looked at.
    """

    def __init__(self, config: Config, processes: Processes):
        self.steps = config.train.profile_steps if processes.is_main else None
        self.folder = Path(config.run_dir) / FOLDER
        self.cuda = processes.device.type == "cuda"
        self.running: profile | None = None

    def before(self, step: int) -> None:
        """Begin where step number `step`, from 0, is the first one."""
        if self.steps is None or step != self.steps[0]:
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)
        self.running = profile(activities=activities, record_shapes=True)
        self.running.start()

    def after(self, step: int) -> None:
        """End where step number `step` is the last one."""
        if self.running is not None and step == self.steps[1]:
            self.stop()

    def stop(self) -> None:
        """Write what is recorded, whole or not."""
        if self.running is None:
            return
        running, self.running = self.running, None
        running.stop()
        try:
            self._write(running)
        except OSError as error:
            log.warning("%s: no trace: %s", self.folder, error.strerror or error)
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace_step_{self.steps[0]:07d}.json.gz"
        recorded.export_chrome_trace(str(trace))
        log.info("%s: a trace from step %d on", trace, self.steps[0])
        if self.cuda:
            memory = self.folder / f"memory_step_{self.steps[0]:07d}.pickle"
            torch.cuda.memory._dump_snapshot(str(memory))
            log.info("%s: every allocation of these steps", memory)
