"""What a run reports: progress, `metrics.jsonl`, and the loggers beside it."""

import json
import logging
import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.schema import Config
from core.distributed import Processes
from core.files import complete_file
from core.logging import get_logger, progress
from models.dit import DiT
from training.attempts import run_id
from training.flops import matmul_rate, training_flops
from training.loggers import Logger, build_loggers
from training.routing_statistics import RoutingStatistics, routing_statistics
from training.step import StepResult
from training.validation import BINS

METRICS_FILE = "metrics.jsonl"
log: logging.Logger = get_logger("telemetry")


class Telemetry:
    """Collects losses on the device and looks at them every `log_every` steps.

    Args:
        config: of the run.
        processes: losses are means over all; the main process writes.
        first_step: steps taken before; later entries of an earlier attempt are dropped.
        running: what `running` gave when the run was interrupted there.
    """

    def __init__(
        self, config: Config, processes: Processes, first_step: int, running: dict[str, Any]
    ):
        self.processes, self.config = processes, config
        self.every = config.train.log_every
        self.last_step = config.train.max_steps
        self.loggers: list[Logger] = []
        self.unwritten: list[str] = []
        self.metrics = Path(config.run_dir) / METRICS_FILE
        if processes.is_main:
            self._drop_entries_after(first_step)
            self.loggers = build_loggers(config, first_step, run_id(Path(config.run_dir)))
        self.bar = progress(
            None, processes, "training", "step", total=self.last_step, initial=first_step
        )
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        self.possible = matmul_rate(processes.device, dtype) * processes.world_size
        self.flops = training_flops(config.model)
        sums = running.get("sums", {})
        self.sums = {n: torch.tensor(v, device=processes.device) for n, v in sums.items()}
        self.steps = running.get("steps", 0)
        self.timed, self.data_seconds, self.since = 0, 0.0, time.perf_counter()

    def running(self) -> dict[str, Any]:
        """Sums since the last entry, of this process, as plain numbers for a checkpoint."""
        return {"steps": self.steps, "sums": {n: v.item() for n, v in self.sums.items()}}

    def step(self, step: int, result: StepResult) -> None:
        """Take in the result of a step; `step` counts those taken, this one included."""
        taken = result.losses | {"grad_norm": result.grad_norm, "skipped": 1 - result.finite}
        for name, value in taken.items():
            # A skipped step would make every mean NaN.
            value = torch.where(result.finite > 0, value, 0.0) if name != "skipped" else value
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.timed += 1
        self.data_seconds += result.data_seconds
        self.bar.update()

    def is_due(self, step: int) -> bool:
        """Whether an entry is written after `step` steps."""
        return step % self.every == 0 or step == self.last_step

    def report(
        self, step: int, result: StepResult, model: DiT, lr: float, phases: dict[str, float]
    ) -> None:
        """Write an entry: means since the last one, routing and phases of this step."""
        names = sorted(self.sums)
        means = torch.stack([self.sums[name].float() for name in names])
        means = dict(zip(names, self.processes.all_reduce_mean(means).tolist(), strict=True))
        skipped = means.pop("skipped")
        taken = max(1.0, self.steps - skipped)
        norm = means.pop("grad_norm") / taken
        scalars = {f"loss/{name}": value / taken for name, value in means.items()}
        scalars |= {"grad_norm": norm, "skipped_steps": skipped, "lr": lr}
        scalars |= self._speed(phases)
        routing = routing_statistics(result.records, result.noise_levels, model, self.processes)
        self._write(step, scalars | _routing_scalars(routing), routing)
        rate = scalars["images_per_second"]
        self.bar.set_postfix(loss=f"{scalars['loss/loss']:.4f}", img_per_s=f"{rate:.0f}")
        self.sums, self.steps = {}, 0
        self.timed, self.data_seconds, self.since = 0, 0.0, time.perf_counter()

    def validation(self, step: int, losses: Tensor) -> None:
        """Losses (BINS,) by noise level."""
        scalars = {"val/loss": losses.nanmean().item()}
        for i, value in enumerate(losses.tolist()):
            if not math.isnan(value):
                scalars[f"val/loss_at_noise_{(i + 0.5) / BINS:.2f}"] = value
        self._write(step, scalars, None)

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Scores of samples by name."""
        self._write(step, {f"scores/{name}": value for name, value in scores.items()}, None)

    def images(self, step: int, name: str, grid: Tensor) -> None:
        """A picture (H, W, 3) uint8."""
        for logger in self.loggers:
            logger.image(step, name, grid)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent in a block (samples, checkpoints) out of images/s."""
        began = time.perf_counter()
        yield
        self.since += time.perf_counter() - began

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        for logger in self.loggers:
            logger.close()

    def has(self, step: int, prefix: str) -> bool:
        """Whether there is an entry of `step` with a number whose name starts so."""
        if not self.metrics.exists():
            return False
        entries = map(json.loads, self.metrics.read_text().splitlines())
        return any(e["step"] == step and any(k.startswith(prefix) for k in e) for e in entries)

    def _speed(self, phases: dict[str, float]) -> dict[str, float]:
        device = self.processes.device
        rate = self.timed * self.config.train.global_batch_size / (time.perf_counter() - self.since)
        wait = self.data_seconds / max(1, self.timed)
        phases = phases | {"data": wait, "forward_backward": phases["forward_backward"] - wait}
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "images_per_second": rate,
            "mfu": rate * self.flops / self.possible,
            "memory_gib": memory / 2**30,
            **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
        }

    def _write(
        self, step: int, scalars: dict[str, float], routing: RoutingStatistics | None
    ) -> None:
        if not self.processes.is_main:
            return
        entry, histograms = {"step": step, **scalars}, {}
        if routing is not None:
            for i, load in enumerate(routing.loads):
                histograms[f"tokens_per_expert/moe_layer_{i}"] = load
            for i, row in enumerate([] if routing.state is None else routing.state):
                histograms[f"{routing.state_name}/moe_layer_{i}"] = row
            entry["capacity_by_noise"] = _without_nan(routing.capacity)
        for logger in self.loggers:
            logger.numbers(step, scalars, histograms)
        self.unwritten.append(json.dumps(entry) + "\n")
        try:
            with self.metrics.open("a") as file:
                file.write("".join(self.unwritten))
        except OSError as error:
            log.warning(
                "%s: %s; %d entries wait in memory",
                *(self.metrics, error.strerror or error, len(self.unwritten)),
            )
        else:
            self.unwritten.clear()

    def _drop_entries_after(self, step: int) -> None:
        """Keep what belongs to the steps taken; a line that a kill cut short goes as well."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:
                continue
        with complete_file(self.metrics) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))


def _routing_scalars(routing: RoutingStatistics | None) -> dict[str, float]:
    """By layer, and capacity by noise level over all layers."""
    if routing is None:
        return {}
    scalars = {}
    for i, load in enumerate(routing.loads):
        layer = f"moe_layer_{i}"
        scalars[f"capacity/{layer}"] = routing.mean_capacity[i].item()
        scalars[f"max_load/{layer}"] = (load.max() / load.mean()).item()
        if routing.accuracy is not None:
            scalars[f"predictor_accuracy/{layer}"] = routing.accuracy[i].item()
        if routing.state_name == "thresholds":
            scalars[f"mean_threshold/{layer}"] = routing.state[i].mean().item()
        if routing.state_name == "correction_bias":
            spread = routing.state[i].max() - routing.state[i].min()
            scalars[f"bias_range/{layer}"] = spread.item()
    for i, value in enumerate(routing.capacity.mean(dim=0).tolist()):
        if not math.isnan(value):
            scalars[f"capacity_at_noise/{(i + 0.5) / BINS:.2f}"] = value
    return scalars


def _without_nan(table: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(v) else round(v, 6) for v in row] for row in table.tolist()]
