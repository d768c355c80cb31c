"""What a run reports: progress bar, TensorBoard, and `metrics.jsonl`."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from config.schema import Config
from core.distributed import Processes
from core.logging import progress
from core.types import RoutingRecord
from models.dit import DiT
from training.router_state import capacity_predictors
from training.step import StepResult

METRICS_FILE = "metrics.jsonl"


class Telemetry:
    """Collects losses on the device and looks at them every `log_every` steps.

    Args:
        config: of the run.
        processes: losses are means over all; the main process writes.
        first_step: steps taken before; later entries of an earlier attempt are dropped.
    """

    def __init__(self, config: Config, processes: Processes, first_step: int):
        self.processes = processes
        self.every = config.train.log_every
        self.batch = config.train.global_batch_size
        self.last_step = config.train.max_steps
        self.writer = None
        run_dir = Path(config.run_dir)
        self.metrics = run_dir / METRICS_FILE
        if processes.is_main:
            self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=first_step or None)
            self._drop_entries_after(first_step)
        self.bar = progress(
            None, processes, "training", "step", total=self.last_step, initial=first_step
        )
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.since = time.perf_counter()

    def step(self, step: int, result: StepResult, model: DiT, lr: float) -> None:
        """Take in the result of a step; `step` counts those taken, this one included."""
        for name, value in result.losses.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1
        self.bar.update()
        if step % self.every == 0 or step == self.last_step:
            self._report(step, result, model, lr)

    def images(self, step: int, name: str, grid: Tensor) -> None:
        """A picture (H, W, 3) uint8."""
        if self.writer is not None:
            self.writer.add_image(name, grid, step, dataformats="HWC")

    def pause(self) -> "_Pause":
        """Leave the time spent in a block (samples, checkpoints) out of images/s."""
        return _Pause(self)

    def close(self) -> None:
        """Finish the bar and the files."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _report(self, step: int, result: StepResult, model: DiT, lr: float) -> None:
        names = sorted(self.sums)
        means = torch.stack([self.sums[name] for name in names]) / self.steps
        routing = routing_statistics(result.records, model)
        loads = {name: self.processes.all_reduce_sum(load) for name, load in routing.loads.items()}
        means = self.processes.all_reduce_mean(means).tolist()
        rate = self.steps * self.batch / (time.perf_counter() - self.since)
        scalars = {f"loss/{n}": v for n, v in zip(names, means, strict=True)}
        for name, capacity in routing.capacity.items():
            scalars[f"capacity/{name}"] = self.processes.all_reduce_mean(capacity).item()
        for name, load in loads.items():
            scalars[f"max_load/{name}"] = (load.max() / load.mean()).item()
        scalars |= {"lr": lr, "images_per_second": rate}
        if self.writer is not None:
            self._write(step, scalars, loads)
        self.bar.set_postfix(loss=f"{scalars['loss/loss']:.4f}", img_per_s=f"{rate:.0f}")
        self.sums, self.steps, self.since = {}, 0, time.perf_counter()

    def _write(self, step: int, scalars: dict[str, float], loads: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        for name, load in loads.items():
            self.writer.add_histogram(f"tokens_per_expert/{name}", load, step, bins="auto")
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")

    def _drop_entries_after(self, step: int) -> None:
        if self.metrics.exists():
            lines = self.metrics.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            self.metrics.write_text("".join(f"{line}\n" for line in kept))


class _Pause:
    def __init__(self, telemetry: Telemetry):
        self.telemetry = telemetry

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.telemetry.since += time.perf_counter() - self.began


class RoutingStatistics:
    """Loads (E,) and capacity of each MoE layer, by the layer's name."""

    def __init__(self):
        self.loads: dict[str, Tensor] = {}
        self.capacity: dict[str, Tensor] = {}


@torch.no_grad()
def routing_statistics(records: list[list[RoutingRecord]], model: DiT) -> RoutingStatistics:
    """What the routers did in one step of this process.

    The capacity of a layer with a predictor is the one that its thresholds would give on these
    tokens in dynamic inference (Eq. 14); that of any other is what was computed (Eq. 8).

    Args:
        records: for each micro-batch, the records of the layers.
        model: that made them.
    """
    statistics = RoutingStatistics()
    predictors = capacity_predictors(model)
    for i, layers in enumerate(zip(*records, strict=True)):
        name = f"moe_layer_{i}"
        statistics.loads[name] = torch.stack([r.counts.sum(0) for r in layers]).sum(0).float()
        if predictors:
            taken = [predictors[i].counts(r.capacity_logits).sum() for r in layers]
            tokens = sum(len(r.capacity_logits) for r in layers)
            statistics.capacity[name] = torch.stack(taken).sum() / tokens
        else:
            statistics.capacity[name] = torch.cat([r.capacity_per_sample() for r in layers]).mean()
    return statistics
