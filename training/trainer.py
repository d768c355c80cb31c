"""The training loop."""

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch

from config.load import dump_config
from config.schema import Config
from config.validate import fitting_micro_batch
from core.distributed import Processes, losses_named
from core.errors import UserError
from core.files import complete_file, complete_folder
from core.logging import get_logger, quiet_other_processes
from core.precision import set_tf32
from core.rng import derive_seed
from data.loader import training_batches
from data.sources import training_data
from data.vae import VAE, PixelSpace, open_vae, to_uint8
from models.build import build_model
from models.dit import DiT
from models.pretrained import CONFIG_FILE, save_weights
from models.sealed import checkpoints
from models.summary import summarize
from sampling.generate import Sampler
from sampling.grid import image_grid, save_png
from sampling.objectives import build_objective
from training.checkpoint import TrainingState, initialise, resume, save_checkpoint
from training.ema import EMA
from training.interruption import StopRequest
from training.optim import build_optimizer, learning_rate
from training.parallel import build_sharded, is_sharded, prepare
from training.scores import SampleScores
from training.step import Batch, StepResult, TrainStep
from training.telemetry import Telemetry
from training.validation import Validation

log: logging.Logger = get_logger("train")


def train(config: Config, processes: Processes) -> None:
    """Train as `config` says, from the start or the newest checkpoint, to `max_steps`.

    Raises:
        UserError: when data, VAE, checkpoint and config do not fit each other, when too many steps
            in a row are not finite, or when a worker or another process is lost.
    """
    with losses_named():
        Trainer(config, processes).fit()


def _shared_evenly(config: Config, processes: Processes) -> Config:
    """The config with a micro-batch that this number of processes shares a step by.

    A smaller one is the same training with other draws, since `validate` lets it through only
    where routing does not see the batch.
    """
    fitting = fitting_micro_batch(config, processes.world_size)
    if fitting == config.train.micro_batch_size:
        return config
    balanced = getattr(config.model.feed_forward, "balance_loss_weight", 0) > 0
    log.info(
        "train.micro_batch_size: %d instead of %d, so that %d processes share %d images%s",
        *(fitting, config.train.micro_batch_size),
        *(processes.world_size, config.train.global_batch_size),
        "; the balance loss is that of the smaller ones" if balanced else "",
    )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batch_size=fitting)
    )


class Trainer:
    """One run: model, averages, optimizer and data of this process."""

    def __init__(self, config: Config, processes: Processes):
        quiet_other_processes(processes)
        set_tf32(config.train.tf32)
        config = _shared_evenly(config, processes)
        self.config, self.processes = config, processes
        self.run_dir = Path(config.run_dir)
        self.data = training_data(config, processes)
        self.objective = build_objective(config.objective)
        self.validation = None
        if config.train.val_every:
            self.validation = Validation(config, self.objective, processes)
        self.vae = self._load_vae()
        self.scores = None
        if config.evaluation.every:
            shape = self.data.source.latent_shape
            self.scores = SampleScores(config, self.objective, self.vae, shape, processes)
        self.state = self._build()
        resume(self.state, processes)
        bare = self.state.model
        model = prepare(bare, config, processes)
        self.train_step = TrainStep(
            model, bare, self.objective, self.state.optimizer, config, processes
        )
        self.streak = torch.zeros(2, device=processes.device)  # of skipped steps: now, longest

    def fit(self) -> None:
        """Take the steps that are left, and write the last checkpoint."""
        state, last = self.state, self.config.train.max_steps
        if state.step >= last:
            log.info("%s: already at step %d", self.run_dir, state.step)
            return
        self._announce()
        began, first = time.perf_counter(), state.step
        batches = training_batches(self.data, self.config, self.processes, state.step)
        telemetry = Telemetry(self.config, self.processes, state.step, state.running)
        state.model.train()
        with StopRequest(self.processes).listening() as stop:
            while state.step < last:
                self._step(batches, telemetry)
                stopping = stop.agreed()
                with telemetry.pause():
                    self._write_what_is_due(telemetry, stopping)
                if stopping and state.step < last:
                    log.warning("SIGTERM: stopped at step %d; --resume auto goes on", state.step)
                    break
        telemetry.close()
        if state.step == last:
            self._say_what_next(last - first, time.perf_counter() - began)

    def _say_what_next(self, steps: int, seconds: float) -> None:
        """Where the checkpoint is, how long it took, and the command that looks at it."""
        log.info("%d steps in %s", steps, timedelta(seconds=round(seconds)))
        log.info("checkpoint: %s", checkpoints(self.run_dir)[0])
        log.info("log: tensorboard --logdir %s", self.run_dir)
        log.info("next: torchrun sample_ddp.py --ckpt %s --num-fid-samples 100", self.run_dir)

    def _step(self, batches: Iterator[Batch], telemetry: Telemetry) -> None:
        state = self.state
        lr = learning_rate(self.config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        result = self.train_step(batches, state.step)
        for ema in state.emas.values():
            ema.update(state.model, state.step, result.finite)
        self.train_step.clock.mark("optimizer")
        state.step += 1
        now = (self.streak[0] + 1) * (1 - result.finite)
        self.streak = torch.stack([now, torch.maximum(now, self.streak[1])])
        telemetry.step(state.step, result)
        if telemetry.is_due(state.step):
            phases = self.train_step.clock.read()
            telemetry.report(state.step, result, state.model, lr, phases)
            self._check_streak(result)

    def _check_streak(self, result: StepResult) -> None:
        """Stop after too many skipped steps in a row; what they started from is kept."""
        limit = self.config.train.max_nonfinite_steps
        longest = int(self.streak[1])
        if longest < limit:
            return
        folder = self.run_dir / f"nonfinite_step_{self.state.step:07d}"
        if self.processes.is_main and not self._is_sharded:
            with complete_folder(folder) as temporary:
                save_weights(self.state.model, temporary / "model.safetensors")
                bad = [
                    name
                    for name, p in self.state.model.named_parameters()
                    if p.grad is not None and not p.grad.isfinite().all()
                ]
                facts = {
                    "step": self.state.step,
                    "losses": {n: str(v.item()) for n, v in result.losses.items()},
                    "grad_norm": str(result.grad_norm.item()),
                    "parameters_with_nonfinite_gradient": bad,
                }
                (temporary / "facts.json").write_text(json.dumps(facts, indent=2))
        raise UserError(
            f"training: {longest} steps in a row had a non-finite loss or gradient "
            f"(train.max_nonfinite_steps {limit}); weights and facts are in {folder}"
        )

    @property
    def _is_sharded(self) -> bool:
        return is_sharded(self.config, self.processes)

    def _build(self) -> TrainingState:
        """Model, averages and optimizer at step 0, on this process's device."""
        config, optim = self.config, self.config.optim
        decays = {"ema": optim.ema_decay}
        decays |= {f"ema_{decay:g}": decay for decay in optim.extra_ema_decays}
        if self._is_sharded:
            model, *copies = self._build_sharded(1 + len(decays))
        else:
            model = self._build_whole().to(self.processes.device)
            copies = [copy.deepcopy(model) for _ in decays]
        emas = {
            name: EMA(average, decay, optim.ema_warmup)
            for (name, decay), average in zip(decays.items(), copies, strict=True)
        }
        source = self.data.source
        latents = {
            "vae_path": source.vae_path,
            "scaling_factor": source.scaling_factor,
            "shift_factor": source.shift_factor,
            "latent_channels": source.latent_shape[0],
            "class_names": source.class_names if config.model.num_classes else [],
        }
        return TrainingState(config, model, emas, build_optimizer(model, optim), latents)

    def _build_whole(self) -> DiT:
        """The model with its first weights, on the CPU."""
        torch.manual_seed(derive_seed(self.config.seed, "weights"))
        model = build_model(self.config.model)
        initialise(self.config, model)
        return model

    def _build_sharded(self, count: int) -> list[DiT]:
        """`count` equal models spread over the processes; only the main one builds it whole."""
        whole, refusal = {}, None
        if self.processes.is_main:
            try:
                whole = self._build_whole().state_dict()
            except UserError as error:
                refusal = str(error)
        refusal = self.processes.from_main(refusal)
        if refusal is not None:
            raise UserError(refusal)
        return [build_sharded(self.config, self.processes, whole) for _ in range(count)]

    def _write_what_is_due(self, telemetry: Telemetry, stopping: bool) -> None:
        train, step = self.config.train, self.state.step
        last = step == train.max_steps
        if step % train.ckpt_every == 0 or last or stopping:
            self.state.running = telemetry.running()
            save_checkpoint(self.state, self.processes)
        if stopping and not last:
            return
        if train.val_every and (step % train.val_every == 0 or last):
            losses = self.validation.losses(self.state.emas["ema"].model, self._is_sharded)
            telemetry.validation(step, losses)
        every = self.config.evaluation.every
        if every and (step % every == 0 or last):
            scores = self.scores.score(self.state.emas["ema"].model, self._is_sharded)
            telemetry.scores(step, scores)
        if train.sample_every and (step % train.sample_every == 0 or last):
            self._sample_grid(telemetry)
            self.processes.barrier()

    def _sample_grid(self, telemetry: Telemetry) -> None:
        """Images of the averaged weights, always of the same noise and classes."""
        if not (self.processes.is_main or self._is_sharded):
            return
        config, count = self.config, self.config.train.num_grid_samples
        sampler = Sampler(
            self.state.emas["ema"].model,
            self.objective,
            config.sampling,
            self.data.source.latent_shape,
            config.seed,
            self.processes.device,
        )
        labels = [i % max(config.model.num_classes, 1) for i in range(count)]
        latents, _ = sampler.latents(range(count), labels)  # a sharded model: all together
        if self.processes.is_main:
            grid = image_grid(to_uint8(self.vae.decode(latents)))
            telemetry.images(self.state.step, "samples/ema", grid)
            save_png(grid, self.run_dir / "samples" / f"step_{self.state.step:07d}.png")

    def _load_vae(self) -> VAE | PixelSpace | None:
        """The decoder for sample grids and scores, where they are wanted and made."""
        grids = self.config.train.sample_every and self.processes.is_main
        if not (grids or self.config.evaluation.every):
            return None
        return open_vae(self.config.data.vae_path, self.processes.device)

    def _announce(self) -> None:
        if not self.processes.is_main:
            return
        with complete_file(self.run_dir / CONFIG_FILE) as temporary:
            temporary.write_text(dump_config(self.config))
        summary = summarize(self.config.model)
        log.info(
            "%s: %.1fM parameters (%.1fM activated), %d images, steps %d to %d, "
            "%d process(es) on %s",
            self.run_dir,
            summary.trainable / 1e6,
            summary.activated(summary.capacity) / 1e6,
            len(self.data),
            self.state.step,
            self.config.train.max_steps,
            self.processes.world_size,
            self.processes.device.type,
        )
