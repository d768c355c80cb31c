"""Where the numbers of a run are shown, beside `metrics.jsonl`: TensorBoard, Weights & Biases."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config.load import to_plain
from config.schema import Config
from core.errors import UserError
from core.logging import get_logger

log: logging.Logger = get_logger("loggers")

Histograms = dict[str, Tensor]


class Logger(Protocol):
    """A place for numbers, by name and step."""

    def numbers(self, step: int, scalars: dict[str, float], histograms: Histograms) -> None:
        """Scalars, and values (N,) whose distribution is shown."""
        ...

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """A picture (H, W, 3) uint8."""
        ...

    def close(self) -> None:
        """Bring everything to its place."""
        ...


class TensorBoard:
    """Event files in <run_dir>/tensorboard."""

    def __init__(self, config: Config, first_step: int, run_id: str):
        self.folder = Path(config.run_dir) / "tensorboard"
        # What an earlier attempt wrote of later steps is not this run's.
        self.writer: SummaryWriter | None = None
        self._write(0, lambda writer: None, first_step + 1 if first_step else None)

    def numbers(self, step: int, scalars: dict[str, float], histograms: Histograms) -> None:
        """See `Logger`."""

        def write(writer: SummaryWriter) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            for name, values in histograms.items():
                writer.add_histogram(name, values, step)

        self._write(step, write)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """See `Logger`."""
        self._write(step, lambda w: w.add_image(name, picture, step, dataformats="HWC"))

    def close(self) -> None:
        """See `Logger`."""
        if self.writer is not None:
            self._write(0, lambda writer: writer.close())

    def _write(
        self, step: int, write: Callable[[SummaryWriter], None], purge: int | None = None
    ) -> None:
        """Pictures of numbers are not worth a run: where the disk refuses, a new file is tried."""
        try:
            if self.writer is None:
                self.writer = SummaryWriter(self.folder, purge_step=purge)
            write(self.writer)
        except OSError as error:  # of this call, or of an earlier one: a thread writes
            reason = error.strerror or error
            log.warning("%s: numbers up to step %d are missing: %s", self.folder, step, reason)
            self.writer = None


class WeightsAndBiases:
    """A run of project `diffmoe`, which a resumed run goes on with.

    Raises:
        UserError: the package is missing, or its service cannot be reached.
    """

    def __init__(self, config: Config, first_step: int, run_id: str):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"train.logger: {config.train.logger} needs the package wandb: "
                "pip install 'diffmoe[wandb]', or train.logger tensorboard"
            ) from None
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project="diffmoe",
                name=Path(config.run_dir).name,
                dir=config.run_dir,
                id=run_id,
                resume="allow",
                config=to_plain(dataclasses.asdict(config)),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"train.logger: wandb: {error}; WANDB_MODE=offline needs no service"
            ) from error
        # Not wandb's own count, which never goes back.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def numbers(self, step: int, scalars: dict[str, float], histograms: Histograms) -> None:
        """See `Logger`."""
        shown = {n: self.wandb.Histogram(v.cpu().numpy()) for n, v in histograms.items()}
        self.run.log({"step": step} | scalars | shown)

    def image(self, step: int, name: str, picture: Tensor) -> None:
        """See `Logger`."""
        self.run.log({"step": step, name: self.wandb.Image(picture.to(torch.uint8).numpy())})

    def close(self) -> None:
        """See `Logger`."""
        self.run.finish()


KINDS = {
    "tensorboard": (TensorBoard,),
    "wandb": (WeightsAndBiases,),
    "both": (TensorBoard, WeightsAndBiases),
}
"""By `train.logger`."""


def build_loggers(config: Config, first_step: int, run_id: str) -> list[Logger]:
    """What `train.logger` names.

    Args:
        config: of the run.
        first_step: steps taken before.
        run_id: the same at every start of a run.
    """
    return [kind(config, first_step, run_id) for kind in KINDS[config.train.logger]]
