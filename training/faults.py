"""Faults that `training.verify_resume` makes in a process of a run."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

import models.sealed
import training.looks
import training.saving
from data.vae import PixelSpace
from models.sealed import checkpoints
from training.step import TrainStep


class Decoder(PixelSpace):
    """Shows the first channels of latents of which no VAE knows."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, h, w)."""
        return super().decode(latents[:, :3])


def without_vae() -> None:
    """Let grids of this process need no VAE."""
    training.looks.open_vae = lambda path, device: Decoder(device)


def arm(fault: str, step: int, delay: float) -> None:
    """Make this process kill or stop itself, as the name in FAULTS says.

    Args:
        fault: one of FAULTS.
        step: in which, where the fault is one of a step.
        delay: seconds into the step, for a kill at a random moment.
    """
    FAULTS[fault](step, delay)


def _kill_at_random(step: int, delay: float) -> None:
    _in_step(step, lambda: threading.Timer(delay, _kill).start())


def _kill_while_writing(step: int, delay: float) -> None:
    before(training.saving, "seal", second_time(_kill))


def _kill_before_rename(step: int, delay: float) -> None:
    again = second_time(_kill)
    before(os, "replace", lambda old, new: Path(new).name.startswith("step_") and again())


def _kill_before_latest(step: int, delay: float) -> None:
    before(training.saving, "point_latest", second_time(_kill))


def _terminate_in_step(step: int, delay: float) -> None:
    _in_step(step, lambda: _send(signal.SIGTERM))


def _interrupt_in_step(step: int, delay: float) -> None:
    _in_step(step, lambda: _send(signal.SIGINT))


def _terminate_in_grid(step: int, delay: float) -> None:
    before(training.looks.Looks, "_grid_latents", lambda *_: _send(signal.SIGTERM))


def _terminate_while_saving(step: int, delay: float) -> None:
    before(training.saving, "write_tensors", second_time(lambda: _send(signal.SIGTERM)))


FAULTS = {
    "SIGKILL at a random moment": _kill_at_random,
    "SIGKILL while a checkpoint is written": _kill_while_writing,
    "SIGKILL before its rename": _kill_before_rename,
    "SIGKILL before latest points to it": _kill_before_latest,
    "SIGTERM in a step": _terminate_in_step,
    "SIGTERM while a grid is sampled": _terminate_in_grid,
    "SIGTERM while a checkpoint is written": _terminate_while_saving,
    "Ctrl-C": _interrupt_in_step,
}
"""What happens to the first process of a run."""


def damage_newest(run: Path) -> None:
    """Change one bit of the newest checkpoint."""
    path = checkpoints(run)[0] / "ema.safetensors"
    path = path if path.exists() else next(path.with_suffix("").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


@contextmanager
def unreadable_at_first(run: Path) -> Iterator[None]:
    """Let the first look at every file of the newest checkpoint fail, as a lost server would."""
    pauses, read = models.sealed.PAUSES, models.sealed.file_hash
    unseen = {path for path in checkpoints(run)[0].rglob("*") if path.is_file()}

    def refuse(path: Path) -> str:
        if path in unseen:
            unseen.remove(path)
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    models.sealed.PAUSES, models.sealed.file_hash = (0.01,), refuse
    try:
        yield
    finally:
        models.sealed.PAUSES, models.sealed.file_hash = pauses, read


def before(owner: Any, name: str, first: Callable) -> None:
    """Call `first` with the arguments of each call of `owner.name`, then go on."""
    function = getattr(owner, name)

    def call(*args: Any) -> Any:
        first(*args)
        return function(*args)

    setattr(owner, name, call)


def second_time(action: Callable[[], None]) -> Callable:
    """A call that does something when it is called for the second time."""
    count = [0]

    def call(*args: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            action()

    return call


def _in_step(wanted: int, action: Callable[[], None]) -> None:
    before(TrainStep, "__call__", lambda self, batches, step: step == wanted and action())


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _kill() -> None:
    _send(signal.SIGKILL)
