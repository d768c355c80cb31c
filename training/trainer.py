"""The training loop."""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from config.schema import Config
from core.distributed import Processes, losses_named
from core.errors import ConfigError, UserError
from core.files import sweep
from core.locks import exclusive
from core.logging import get_logger, quiet_other_processes
from core.precision import set_tf32
from core.rng import derive_seed
from data.dataset import Batch
from data.loader import training_batches
from data.sources import training_data
from models.build import build_model
from models.dit import DiT
from models.sealed import checkpoints
from models.summary import summarize
from sampling.objectives import build_objective
from training.attempts import record_attempt
from training.changes import facts_of
from training.checkpoint import (
    TrainingState,
    check_start,
    checkpoint_of,
    initialise,
    resume,
    save_checkpoint,
    saved_tensors,
)
from training.dump import dump_nonfinite
from training.ema import EMA
from training.interruption import StopRequest
from training.looks import Looks
from training.optim import build_optimizer, learning_rate
from training.parallel import build_sharded, is_sharded, prepare, shared_evenly
from training.profiling import Profiler
from training.saving import CheckpointWriter
from training.step import StepResult, TrainStep
from training.telemetry import Telemetry

log: logging.Logger = get_logger("train")


def train(config: Config, processes: Processes) -> None:
    """Train as `config` says, from the start or the newest checkpoint, to `max_steps`.

    Raises:
        UserError: when data, VAE, checkpoint and config do not fit each other, when somebody else
            trains in `run_dir`, when too many steps in a row are not finite, or when a worker or
            another process is lost.
    """
    quiet_other_processes(processes)
    run_dir = Path(config.run_dir)
    with losses_named(), exclusive(run_dir, "run_dir", processes) as lock:
        if processes.is_main:
            for folder in (run_dir, *(run_dir / n for n in ("checkpoints", "samples", "attempts"))):
                sweep(folder)
        Trainer(config, processes, lock.check).fit()


class Trainer:
    """One run: model, averages, optimizer and data of this process.

    Args:
        config: of the run.
        processes: all of which train.
        check: raises where the run is not this process's any more.
    """

    def __init__(
        self, config: Config, processes: Processes, check: Callable[[], None] = lambda: None
    ):
        set_tf32(config.train.tf32)
        config = shared_evenly(config, processes)
        self.config, self.processes, self.check = config, processes, check
        self.run_dir = Path(config.run_dir)
        self.data = training_data(config, processes)
        self.objective = build_objective(config.objective)
        self.looks = Looks(config, self.objective, self.data, processes)
        checkpoint = checkpoint_of(config, processes)
        self.begins = checkpoint is None
        if self.begins:
            check_start(config, processes)
        self.state = self._build()
        if checkpoint is not None:
            resume(self.state, checkpoint, processes)
        self.writer, self.saved = CheckpointWriter(config, processes, check), self.state.step
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
        else:
            self._announce()
        began, first = time.perf_counter(), state.step
        record_attempt(self.config, state.step, self.processes)
        telemetry = Telemetry(self.config, self.processes, state.step, state.running)
        with (
            StopRequest(self.processes, self.config.train.timeout).listening() as stop,
            self._closing(telemetry),
        ):
            ema = state.emas["ema"].model
            self.looks.catch_up(state.step, ema, telemetry, stop)
            self._take_steps(telemetry, stop)
        if stop.agreed:
            log.info("stopped at step %d; --resume auto goes on", state.step)
        elif first < last:
            self._say_what_next(last - first, time.perf_counter() - began)

    def _take_steps(self, telemetry: Telemetry, stop: StopRequest) -> None:
        state, last = self.state, self.config.train.max_steps
        if state.step >= last:
            return
        steps = last - state.step
        batches = training_batches(self.data, self.config, self.processes, state.position, steps)
        profiler, first = Profiler(self.config, self.processes), state.step
        state.model.train()
        while state.step < last and not stop.agreed:
            profiler.before(state.step)
            self._step(batches, telemetry)
            profiler.after(state.step - 1)
            if state.step == first + 1:  # the optimizer has its moments now
                self.writer.reserve(saved_tensors(state))
            with telemetry.pause():
                self.check()
                if not stop.due(state.step):
                    self._write_what_is_due(telemetry, stop)
        profiler.stop()
        if self.saved != state.step:
            self._save(telemetry, last=True)
        self.writer.finish()

    @contextmanager
    def _closing(self, telemetry: Telemetry) -> Iterator[None]:
        """Whatever ends a block, let the log be closed, and a checkpoint be finished.

        Only a second Ctrl-C does not wait.
        """
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException:
            self.writer.settle()
            raise
        finally:
            telemetry.close()

    def _say_what_next(self, steps: int, seconds: float) -> None:
        """Where the checkpoint is, how long it took, and the command that looks at it."""
        log.info("%d steps in %s", steps, timedelta(seconds=round(seconds)))
        log.info("checkpoint: %s", checkpoints(self.run_dir)[0])
        log.info("log: tensorboard --logdir %s", self.run_dir)
        text = self.config.model.text_hidden_size is not None
        asked = '--prompt "TEXT"' if text else "--num-fid-samples 100"
        log.info("next: torchrun sample_ddp.py --ckpt %s %s", self.run_dir, asked)

    def _step(self, batches: Iterator[Batch], telemetry: Telemetry) -> None:
        state = self.state
        lr = learning_rate(self.config, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        result = self.train_step(batches, state.step)
        for ema in state.emas.values():
            ema.update(state.model, state.step, result.finite)
        self.train_step.clock.mark("optimizer")
        size = self.config.train.global_batch_size
        state.position = state.position.after_batch(size, state.num_images)
        state.step += 1
        now = (self.streak[0] + 1) * (1 - result.finite)
        self.streak = torch.stack([now, torch.maximum(now, self.streak[1])])
        telemetry.step(state.step, result)
        if telemetry.is_due(state.step):
            phases = self.train_step.clock.read()
            telemetry.report(state.step, result, state.model, lr, phases)
            self._check_streak(result, telemetry)

    def _check_streak(self, result: StepResult, telemetry: Telemetry) -> None:
        """Stop after too many skipped steps in a row; they changed nothing, which is saved."""
        limit = self.config.train.max_nonfinite_steps
        longest = int(self.streak[1])
        if longest < limit:
            return
        where = dump_nonfinite(self.state, result, self.processes)
        if self.saved != self.state.step:
            self._save(telemetry, last=True)
            self.writer.settle()
        raise ConfigError(
            f"training: {longest} steps in a row had a non-finite loss or gradient "
            f"(train.max_nonfinite_steps {limit}); {where}"
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
            name: EMA(average, decay, optim.ema_warmup, optim.ema_every)
            for (name, decay), average in zip(decays.items(), copies, strict=True)
        }
        latents = facts_of(self.data, config.model.num_classes > 0)
        optimizer = build_optimizer(model, optim)
        return TrainingState(config, model, emas, optimizer, latents, len(self.data))

    def _build_whole(self) -> DiT:
        """The model with its first weights, on the CPU."""
        torch.manual_seed(derive_seed(self.config.seed, "weights"))
        model = build_model(self.config.model)
        if self.begins:
            conditions = self.data.conditions
            initialise(self.config, model, conditions.text_facts())
            null = conditions.null
            if null is not None:
                model.set_null_text(null)
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
        # Averages are looked at in float32.
        exact = replace(self.config, parallel=replace(self.config.parallel, param_dtype="fp32"))
        return [
            build_sharded(self.config if first else exact, self.processes, whole)
            for first in [True, *[False] * (count - 1)]
        ]

    def _write_what_is_due(self, telemetry: Telemetry, stop: StopRequest) -> None:
        train, step = self.config.train, self.state.step
        if step % train.ckpt_every == 0 or step == train.max_steps:
            self._save(telemetry, last=step == train.max_steps)
        self.looks.take(step, self.state.emas["ema"].model, telemetry, stop)

    def _save(self, telemetry: Telemetry, last: bool) -> None:
        self.state.running = telemetry.running()
        if save_checkpoint(self.state, self.writer, last):
            self.saved = self.state.step

    def _announce(self) -> None:
        if not self.processes.is_main:
            return
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
