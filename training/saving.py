"""Writing checkpoints beside training: a copy of the state, and a thread that brings it to disk."""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.load import dump_config
from config.schema import Config
from core.distributed import Processes
from core.errors import UserError
from core.files import begin_folder, finish_folder
from core.logging import get_logger
from core.tensors import Written, write_tensors
from models.pretrained import CONFIG_FILE, STATE_FILE
from models.sealed import point_latest, remove_old, seal
from training.parts import Part, part_of

log: logging.Logger = get_logger("saving")

AGAIN = 10.0
"""Seconds until a file that the disk refused is tried again."""


@dataclass
class Job:
    """One checkpoint on its way to the disk.

    Attributes:
        temporary: folder that is filled.
        folder: its name when it is complete.
        parts: of this process.
        writers: ranks that write something.
        texts: small files that the main process adds, by name.
    """

    temporary: Path
    folder: Path
    parts: list[Part]
    writers: list[int]
    texts: dict[str, str] = field(default_factory=dict)

    def receipt(self, rank: int) -> Path:
        """Where a process says what it has written."""
        return self.temporary / f".written-{rank}.json"


class CheckpointWriter:
    """Writes checkpoints of one run, one at a time.

    Training goes on as soon as the tensors are copied; a thread of each process writes and hashes
    its files, and that of the main process waits for the others' receipts, seals the folder and
    gives it its name. Processes meet in the file system only, so that no thread needs a collective.
    A disk that refuses is asked again for half of `train.timeout`.

    Args:
        config: of the run.
        processes: all of which save together.
        check: raises where the run is not this process's any more.
    """

    def __init__(
        self, config: Config, processes: Processes, check: Callable[[], None] = lambda: None
    ):
        self.processes, self.config, self.check = processes, config, check
        self.beside = config.train.async_checkpoint
        self.patience = config.train.timeout / 2
        self.buffers: dict[str, dict[str, Tensor]] = {}
        self.thread: threading.Thread | None = None
        self.job: Job | None = None
        self.failure: str | None = None

    def reserve(self, tensors: dict[str, dict[str, Tensor]]) -> None:
        """Make the memory of the copies ready beside the first steps, since that takes a while.

        Args:
            tensors: as of `save`.
        """
        if not self.beside:
            return
        found = (part_of(name, t, self.processes) for name, t in tensors.items())
        parts = [part for part in found if part is not None]

        def work() -> None:
            with suppress(RuntimeError, MemoryError):  # which the first copy will say
                for part in parts:
                    buffers = self.buffers.setdefault(part.file, {})
                    for name, tensor in part.tensors.items():
                        buffers[name] = _buffer(tensor).zero_()  # all pages are there then

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def save(
        self, step: int, tensors: dict[str, dict[str, Tensor]], facts: dict[str, Any], last: bool
    ) -> bool:
        """Begin to write <run_dir>/checkpoints/step_<step>; all processes call this.

        Args:
            step: optimizer steps taken.
            tensors: of each file, by its name; they may change as soon as this returns.
            facts: for `state.json`.
            last: wait for the one before, however long it takes.

        Returns:
            Whether it was begun: not where the disk takes nothing, or is too slow.
        """
        if not self._free(step, last):
            return False
        folder = Path(self.config.run_dir) / "checkpoints" / f"step_{step:07d}"
        found = (part_of(name, t, self.processes) for name, t in tensors.items())
        parts = [part for part in found if part is not None]
        writers = [r for r, some in enumerate(self.processes.gather(bool(parts))) if some]
        temporary = self._begin(folder)
        if temporary is None:
            return False
        beside = self.beside
        if beside:
            try:
                parts = [Part(p.file, self._copied(p), p.metadata) for p in parts]
            except (RuntimeError, MemoryError) as error:
                beside = self.beside = False
                self.buffers.clear()
                log.warning("no memory to copy checkpoints, training waits for them: %s", error)
        texts = {CONFIG_FILE: dump_config(self.config), STATE_FILE: json.dumps(facts, indent=2)}
        self.job = Job(temporary, folder, parts, writers, texts)
        self.thread = threading.Thread(
            target=self._write, args=(self.job,), name="checkpoint", daemon=True
        )
        self.thread.start()
        if not beside:
            self._end_of_last()
        return True

    def finish(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            UserError: on the main process, when it could not be written.
        """
        job = self.job
        self._end_of_last()
        if job is not None and not self.processes.is_main:
            # The end of this process would cut the main one off from whatever needs both.
            until = time.monotonic() + 2 * self.patience
            while job.temporary.exists() and time.monotonic() < until:
                time.sleep(0.1)
        if self.failure is not None and self.processes.is_main:
            raise UserError(self.failure)

    def _free(self, step: int, last: bool) -> bool:
        """Whether the checkpoint before is done on all processes, after some waiting.

        They ask each other again and again: whoever waits in one long collective for a process
        that waits for its disk would take it for dead.
        """
        until = time.monotonic() + self.patience
        while any(self.processes.gather(self.thread is not None and self.thread.is_alive())):
            late = self.processes.from_main(time.monotonic() > until)
            if late and not last:
                if self.processes.is_main:
                    log.warning(
                        "step_%07d is skipped: the disk still writes the checkpoint before", step
                    )
                return False
            time.sleep(0.05)
        self._end_of_last()
        return True

    def settle(self) -> None:
        """Give the last checkpoint a while to become complete, after this process has failed."""
        if self.thread is not None:
            self.thread.join(timeout=60)

    def _begin(self, folder: Path) -> Path | None:
        """The folder to fill; None, and a warning, where the disk takes none."""
        temporary = None
        if self.processes.is_main:
            try:
                temporary = begin_folder(folder)
            except (UserError, OSError) as error:
                self._failed(folder, str(error))
        return self.processes.from_main(temporary)

    def _copied(self, part: Part) -> dict[str, Tensor]:
        """The part's tensors on the CPU, in memory that is used again for every checkpoint."""
        buffers = self.buffers.setdefault(part.file, {})
        for name, tensor in part.tensors.items():
            if name not in buffers:
                buffers[name] = _buffer(tensor)
            buffers[name].copy_(tensor.detach(), non_blocking=True)
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize()
        return buffers

    def _end_of_last(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = self.job = None

    def _write(self, job: Job) -> None:
        """The thread's work."""
        self.failure = None
        try:
            self._write_parts(job)
            if self.processes.is_main:
                self._complete(job)
                train = self.config.train
                remove_old(Path(self.config.run_dir), train.keep_last, train.keep_every)
        except Exception as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            self._failed(job.folder, reason)
        finally:
            if self.processes.is_main:
                shutil.rmtree(job.temporary, ignore_errors=True)

    def _failed(self, folder: Path, reason: str) -> None:
        self.failure = f"{folder}: could not be written: {reason}; older checkpoints are whole"
        if self.processes.is_main:
            log.error("%s", self.failure)

    def _write_parts(self, job: Job) -> None:
        rank = self.processes.rank
        if rank not in job.writers:
            return
        receipt: dict[str, Any] = {}
        until = time.monotonic() + self.patience
        try:
            for part in job.parts:
                written = self._stubbornly(job.temporary / part.file, part, until)
                receipt[part.file] = [written.bytes, written.sha256]
        except OSError as error:
            receipt = {"error": error.strerror or str(error)}
            if self.processes.is_main:
                raise
        unnamed = job.receipt(rank).with_suffix(".part")
        unnamed.write_text(json.dumps(receipt))
        os.replace(unnamed, job.receipt(rank))

    def _stubbornly(self, path: Path, part: Part, until: float) -> Written:
        """Write one file, again and again while the disk refuses."""
        path.parent.mkdir(exist_ok=True)
        while True:
            try:
                return write_tensors(path, part.tensors, part.metadata)
            except OSError as error:
                path.unlink(missing_ok=True)
                left = until - time.monotonic()
                if left <= 0 or not path.parent.exists():  # given up by the main process
                    raise
                reason = error.strerror or error
                log.warning("%s: %s; trying again for %.0f s", path.parent, reason, left)
                time.sleep(min(AGAIN, left))

    def _complete(self, job: Job) -> None:
        """Seal the folder when every process has written, name it, and let old ones go."""
        known: dict[str, Written] = {}
        until = time.monotonic() + 2 * self.patience
        for rank in job.writers:
            while not job.receipt(rank).exists():
                if time.monotonic() > until:
                    raise UserError(f"process {rank} did not write its part (train.timeout)")
                time.sleep(0.05)
            receipt = json.loads(job.receipt(rank).read_text())
            if "error" in receipt:
                raise UserError(f"process {rank}: {receipt['error']}")
            known |= {file: Written(*values) for file, values in receipt.items()}
        for rank in job.writers:
            job.receipt(rank).unlink()
        for name, text in job.texts.items():
            (job.temporary / name).write_text(text)
        seal(job.temporary, known)
        self.check()
        finish_folder(job.temporary, job.folder)
        point_latest(job.folder)


def _buffer(tensor: Tensor) -> Tensor:
    """Memory on the CPU for a copy of a tensor, which a GPU can write to by itself."""
    pinned = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
