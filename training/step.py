"""One optimizer step over the micro-batches of this process."""

import functools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from config.schema import Config
from config.validate import accumulation_steps
from core.distributed import Processes
from core.rng import derive_seed, generator
from core.types import Objective, RoutingRecord
from data.dataset import Batch
from models.dit import DiT
from training import router_state
from training.clock import Clock
from training.parallel import last_micro_batch


@dataclass
class StepResult:
    """What a step leaves behind.

    Attributes:
        losses: scalars by name, means over the micro-batches of this process.
        records: for each micro-batch, the routing records of its layers, without gradients.
        noise_levels: for each micro-batch (B,), 0 at the data and 1 at pure noise.
        grad_norm: L2 norm of the gradient of all parameters, before clipping.
        finite: scalar, 1 if the step was taken, 0 if loss or gradient were not finite.
        data_seconds: time that the host waited for data.
    """

    losses: dict[str, Tensor]
    records: list[list[RoutingRecord]]
    noise_levels: list[Tensor]
    grad_norm: Tensor
    finite: Tensor
    data_seconds: float


class TrainStep:
    """Accumulates gradients over micro-batches and steps optimizer and routers.

    A step whose loss or gradient is not finite on any process is skipped on every process without
    a look at the device: weights, moments and thresholds stay what they were.

    Args:
        model: what is called, possibly wrapped or compiled.
        bare: the same model without wrapper.
        objective: the loss.
        optimizer: over the parameters of `bare`; a fused one.
        config: of the run.
        processes: this one among all.

    Attributes:
        clock: marks `forward_backward`; `optimizer` is for the caller to mark.
    """

    def __init__(
        self,
        model: nn.Module,
        bare: DiT,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: Config,
        processes: Processes,
    ):
        self.model, self.bare, self.objective = model, bare, objective
        self.optimizer, self.processes = optimizer, processes
        self.seed = config.seed
        self.clock = Clock(processes.device)
        self.accumulation = accumulation_steps(config, processes.world_size)
        self.max_norm = config.optim.grad_clip
        self.strategy = config.parallel.strategy
        self.bf16 = config.train.precision == "bf16"

    def __call__(self, batches: Iterator[Batch], step: int) -> StepResult:
        """Take step number `step`, from 0; with the seed it decides noise, times and dropout."""
        self.clock.start()
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        records, levels, waited = [], [], 0.0
        for slot in range(self.accumulation):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            with last_micro_batch(self.model, slot == self.accumulation - 1, self.strategy):
                losses, routing, level = self._micro_batch(batch, step, slot)
            for name, part in losses.items():
                sums[name] = sums.get(name, 0) + part.detach() / self.accumulation
            records.append(routing)
            levels.append(level)
        self.clock.mark("forward_backward")
        norm = self._clip()
        finite = self._step(norm, sums["loss"], records)
        return StepResult(sums, records, levels, norm, finite, waited)

    def _micro_batch(
        self, batch: Batch, step: int, slot: int
    ) -> tuple[dict[str, Tensor], list[RoutingRecord], Tensor]:
        """Forward and backward; losses by name, routing, noise levels."""
        x, cond = (part.to(self.processes.device, non_blocking=True) for part in batch)
        number = slot * self.processes.world_size + self.processes.rank
        draw = generator(self.seed, "train", step, number, device=self.processes.device)
        cond = self.bare.drop_condition(cond, draw)
        if self.bare.config.dropout > 0:  # layers draw from the global generator
            torch.manual_seed(derive_seed(self.seed, "dropout", step, number))
        with self._precision():
            model = functools.partial(self.model, step=step)
            terms = self.objective.training_losses(model, x, cond, draw)
        auxiliary = auxiliary_losses(terms.routing, self.bare.patchify(terms.target))
        loss = terms.per_sample.mean() + sum(auxiliary.values())
        (loss / self.accumulation).backward()
        named = {name: part.mean() for name, part in terms.named.items()}
        losses = {"loss": terms.per_sample.mean()} | named | auxiliary
        return losses, terms.routing, terms.noise_level

    def _clip(self) -> Tensor:
        """L2 norm of the whole gradient, which is clipped if that is asked for."""
        parameters = list(self.bare.parameters())
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.max_norm is not None:
            # Left as it is where the norm is not finite: the step is skipped, and a dump can
            # tell which parameters are to blame.
            finite = torch.nan_to_num(norm, nan=0.0, posinf=0.0)
            nn.utils.clip_grads_with_norm_(parameters, self.max_norm, finite)
        return norm

    def _precision(self) -> AbstractContextManager:
        if not self.bf16:
            return nullcontext()
        return torch.autocast(self.processes.device.type, torch.bfloat16)

    @torch.no_grad()
    def _step(self, norm: Tensor, loss: Tensor, records: list[list[RoutingRecord]]) -> Tensor:
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        rows, bad = router_state.reduce(self.bare, records, bad.float(), self.processes)
        # What a gradient scaler would tell a fused optimizer; it then leaves all as it is.
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad
        self.optimizer.step()
        finite = 1 - bad
        router_state.apply(self.bare, rows, finite)
        return finite


def auxiliary_losses(
    records: list[RoutingRecord], target: Tensor | None = None
) -> dict[str, Tensor]:
    """The routers' weighted losses by name, summed over the layers.

    The published code and configs sum the capacity loss too, where Eq. 12 divides by their
    number L.

    Args:
        records: of one forward pass.
        target: (B, S, F) what the model was to predict, in patches; without it, layers that
            predict it themselves (per-layer regularisation) are not judged.
    """
    sums: dict[str, Tensor] = {}
    for record in records:
        losses = record.losses
        if record.prediction is not None and target is not None:
            losses = losses | {"plr": record.plr_loss(target)}
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0) + loss
    return sums
