"""The training loop."""

import logging
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from config.load import dump_config
from config.schema import Config
from config.validate import accumulation_steps
from core.distributed import Processes
from core.files import complete_file
from core.logging import get_logger, quiet_other_processes
from core.rng import derive_seed
from data.latents import LatentCache, LatentDataset, check_cache
from data.loader import training_loader
from data.vae import VAE, to_uint8
from models.build import build_model
from models.pretrained import CONFIG_FILE
from sampling.generate import Sampler
from sampling.grid import image_grid, save_png
from sampling.objectives import build_objective
from training import router_state
from training.checkpoint import initialise, resume, save_checkpoint
from training.ema import EMA
from training.optim import build_optimizer, learning_rate
from training.step import train_step
from training.telemetry import Telemetry

log: logging.Logger = get_logger("train")


def train(config: Config, processes: Processes) -> None:
    """Train as `config` says, from the start or the newest checkpoint, to `max_steps`.

    Raises:
        UserError: when data, VAE, checkpoint and config do not fit each other.
    """
    Trainer(config, processes).fit()


class Trainer:
    """One run: model, averages, optimizer and data of this process."""

    def __init__(self, config: Config, processes: Processes):
        quiet_other_processes(processes)
        self.config, self.processes = config, processes
        self.run_dir = Path(config.run_dir)
        self.cache = LatentCache(Path(config.data.cached_path))
        check_cache(self.cache, config.data, config.model)
        self.vae = self._load_vae()
        torch.manual_seed(derive_seed(config.seed, "weights"))
        self.bare = build_model(config.model).to(processes.device)
        initialise(config, self.bare)
        self.ema = EMA(self.bare, config.optim.ema_decay, config.optim.ema_warmup)
        self.optimizer = build_optimizer(self.bare, config.optim)
        self.objective = build_objective(config.objective)
        self.step = resume(config, self.bare, self.ema, self.optimizer)
        self.model = self._wrap()

    def fit(self) -> None:
        """Take the steps that are left, and write the last checkpoint."""
        if self.step >= self.config.train.max_steps:
            log.info("%s: already at step %d", self.run_dir, self.step)
            return
        self._announce()
        train = self.config.train
        dataset = LatentDataset(self.cache, self.config.seed, self.config.data.horizontal_flip)
        batches = iter(training_loader(dataset, self.config, self.processes, self.step))
        accumulation = accumulation_steps(self.config, self.processes.world_size)
        telemetry = Telemetry(self.config, self.processes, self.step)
        self.model.train()
        while self.step < train.max_steps:
            lr = learning_rate(self.config, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            router_state.begin_step(self.bare, self.step)
            result = train_step(
                self.model,
                self.bare,
                self.objective,
                self.optimizer,
                batches,
                accumulation,
                self.step,
                self.config.seed,
                self.processes,
            )
            router_state.update(self.bare, result.records, self.processes)
            self.ema.update(self.bare, self.step)
            self.step += 1
            telemetry.step(self.step, result, self.bare, lr)
            with telemetry.pause():
                self._write_what_is_due(telemetry)
        telemetry.close()

    def _write_what_is_due(self, telemetry: Telemetry) -> None:
        train, last = self.config.train, self.step == self.config.train.max_steps
        grid_due = train.sample_every and (self.step % train.sample_every == 0 or last)
        checkpoint_due = self.step % train.ckpt_every == 0 or last
        if self.processes.is_main and checkpoint_due:
            latents = {
                "vae_path": self.cache.vae_path,
                "scaling_factor": self.cache.scaling_factor,
                "shift_factor": self.cache.shift_factor,
                "latent_channels": self.cache.latent_shape[0],
                "class_names": self.cache.class_names,
            }
            save_checkpoint(self.config, self.step, self.bare, self.ema, self.optimizer, latents)
        if self.processes.is_main and grid_due:
            self._sample_grid(telemetry)
        if grid_due or checkpoint_due:
            self.processes.barrier()

    def _sample_grid(self, telemetry: Telemetry) -> None:
        """Images of the averaged weights, always of the same noise and classes."""
        config, count = self.config, self.config.train.num_grid_samples
        sampler = Sampler(
            self.ema.model,
            self.objective,
            config.sampling,
            self.cache.latent_shape,
            config.seed,
            self.processes.device,
        )
        labels = [i % config.model.num_classes for i in range(count)]
        latents, _ = sampler.latents(range(count), labels)
        grid = image_grid(to_uint8(self.vae.decode(latents)))
        telemetry.images(self.step, "samples/ema", grid)
        save_png(grid, self.run_dir / "samples" / f"step_{self.step:07d}.png")

    def _load_vae(self) -> VAE | None:
        """The decoder for sample grids, where they are wanted and made."""
        if not self.config.train.sample_every or not self.processes.is_main:
            return None
        return VAE(self.config.data.vae_path, self.processes.device)

    def _wrap(self) -> torch.nn.Module:
        """DDP where there are several processes; nothing but gradients is synchronised by it."""
        if self.processes.world_size == 1:
            return self.bare
        cuda = self.processes.device.type == "cuda"
        return DistributedDataParallel(
            self.bare,
            device_ids=[self.processes.device] if cuda else None,
            broadcast_buffers=False,
        )

    def _announce(self) -> None:
        if not self.processes.is_main:
            return
        with complete_file(self.run_dir / CONFIG_FILE) as temporary:
            temporary.write_text(dump_config(self.config))
        millions = sum(p.numel() for p in self.bare.parameters()) / 1e6
        log.info(
            "%s: %.1fM parameters, %d images, steps %d to %d, %d process(es) on %s",
            self.run_dir,
            millions,
            len(self.cache),
            self.step,
            self.config.train.max_steps,
            self.processes.world_size,
            self.processes.device.type,
        )
