"""What is looked at beside training: held-out losses, scores of a few samples, a grid of them."""

import logging
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from config.schema import Config
from core.distributed import Processes
from core.logging import get_logger
from core.types import Objective
from data.dataset import TrainingData
from data.vae import VAE, PixelSpace, open_vae, to_uint8
from models.dit import DiT
from sampling.generate import Sampler
from sampling.grid import image_grid, save_png
from training.interruption import StopRequest
from training.parallel import give_up, is_sharded
from training.scores import SampleScores, wanted_of
from training.telemetry import Telemetry
from training.validation import Validation

log: logging.Logger = get_logger("looks")

Look = Callable[[int, DiT, Telemetry, StopRequest], None]
"""Of a step, at the averaged weights."""


class Looks:
    """Looks at the averaged weights every so many steps, and after the last one.

    Args:
        config: says how often, and at what.
        objective: of the run.
        data: of the run.
        processes: all of which look together.

    Raises:
        UserError: held-out data, VAE, reference or weights cannot be read, or do not fit.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        data: TrainingData,
        processes: Processes,
    ):
        self.config, self.objective, self.processes = config, objective, processes
        self.data, self.latent_shape = data, data.source.latent_shape
        self.sharded = is_sharded(config, processes)
        self.validation = self.scores = None
        if config.train.val_every:
            captions = data.conditions.captions
            texts = None if captions is None else captions.facts
            self.validation = Validation(config, objective, processes, texts)
        self.vae = self._load_vae()
        if config.evaluation.every:
            self.scores = SampleScores(config, objective, self.vae, data, processes)

    def take(self, step: int, model: DiT, telemetry: Telemetry, stop: StopRequest) -> None:
        """Every look that `step` has, until a stop is asked for."""
        self._take(step, model, telemetry, stop, [False, False, False])

    def catch_up(self, step: int, model: DiT, telemetry: Telemetry, stop: StopRequest) -> None:
        """The looks that `step` has and an earlier attempt was interrupted in."""
        if step == 0:
            return
        done = None
        if self.processes.is_main:
            done = [telemetry.has(step, "val/"), telemetry.has(step, "scores/")]
            done.append(self._grid_path(step).exists())
        self._take(step, model, telemetry, stop, self.processes.from_main(done))

    def _take(
        self,
        step: int,
        model: DiT,
        telemetry: Telemetry,
        stop: StopRequest,
        done: list[bool],
    ) -> None:
        train = self.config.train
        looks: list[tuple[int, Look]] = [
            (train.val_every, self._validate),
            (self.config.evaluation.every, self._score),
            (train.sample_every, self._sample_grid),
        ]
        for (every, look), before in zip(looks, done, strict=True):
            has_it = every and (step % every == 0 or step == train.max_steps)
            if has_it and not before and not stop.agreed:
                try:
                    look(step, model, telemetry, stop)
                finally:
                    give_up(model)

    def _validate(self, step: int, model: DiT, telemetry: Telemetry, stop: StopRequest) -> None:
        losses = self.validation.losses(model, self.sharded, stop)
        if losses is not None:
            telemetry.validation(step, losses)

    def _score(self, step: int, model: DiT, telemetry: Telemetry, stop: StopRequest) -> None:
        scores = self.scores.score(model, self.sharded, stop)
        if scores is not None:
            telemetry.scores(step, scores)

    def _sample_grid(self, step: int, model: DiT, telemetry: Telemetry, stop: StopRequest) -> None:
        """Images always of the same noise and classes."""
        latents = None
        if self.processes.is_main or self.sharded:
            with stop.interrupting(model, self.sharded):
                latents = self._grid_latents(model)
        if not stop.ask_all() and self.processes.is_main:
            grid = image_grid(to_uint8(self.vae.decode(latents)))
            telemetry.images(step, "samples/ema", grid)
            try:
                save_png(grid, self._grid_path(step))
            except OSError as error:
                log.warning("%s: not written: %s", self._grid_path(step), error.strerror or error)
        self.processes.barrier()

    def _grid_latents(self, model: DiT) -> Tensor:
        """(N, C, h, w); those of a sharded model are made by all processes together."""
        config, count = self.config, self.config.train.num_grid_samples
        sampler = Sampler(
            model,
            self.objective,
            config.sampling,
            self.latent_shape,
            config.seed,
            self.processes.device,
        )
        classes = max(config.model.num_classes, 1)
        wanted = wanted_of(config, self.data, lambda index: index % classes)
        return sampler.latents(range(count), wanted.condition(range(count)))[0]

    def _grid_path(self, step: int) -> Path:
        return Path(self.config.run_dir) / "samples" / f"step_{step:07d}.png"

    def _load_vae(self) -> VAE | PixelSpace | None:
        """The decoder for sample grids and scores, where they are wanted and made."""
        grids = self.config.train.sample_every and self.processes.is_main
        if not (grids or self.config.evaluation.every):
            return None
        return open_vae(self.config.data.vae_path, self.processes.device)
