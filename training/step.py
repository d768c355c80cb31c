"""One optimizer step over the micro-batches of this process."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from core.distributed import Processes
from core.rng import generator
from core.types import Objective, RoutingRecord
from models.dit import DiT


@dataclass
class StepResult:
    """What a step leaves behind.

    Attributes:
        losses: scalars by name, means over the micro-batches of this process.
        records: for each micro-batch, the routing records of its layers, without gradients.
    """

    losses: dict[str, Tensor]
    records: list[list[RoutingRecord]]


def train_step(
    model: nn.Module,
    bare: DiT,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    accumulation: int,
    step: int,
    seed: int,
    processes: Processes,
) -> StepResult:
    """Accumulate gradients over `accumulation` micro-batches and step the optimizer.

    Args:
        model: what is called, possibly wrapped by DDP.
        bare: the same model without wrapper.
        objective: the loss.
        optimizer: over the parameters of `bare`.
        batches: (latents (B, C, H, W), labels (B,)).
        accumulation: micro-batches of this process.
        step: number of this step, from 0; with `seed` it decides noise, times and label dropout.
        seed: of the run.
        processes: this one among all.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, Tensor] = {}
    records = []
    for slot in range(accumulation):
        x, cond = (t.to(processes.device, non_blocking=True) for t in next(batches))
        number = slot * processes.world_size + processes.rank
        draw = generator(seed, "train", step, number, device=processes.device)
        cond = bare.drop_condition(cond, draw)
        last = slot == accumulation - 1
        with nullcontext() if last or model is bare else model.no_sync():
            terms = objective.training_losses(model, x, cond, draw)
            auxiliary = auxiliary_losses(terms.routing)
            loss = terms.per_sample.mean() + sum(auxiliary.values())
            (loss / accumulation).backward()
        named = {name: part.mean() for name, part in terms.named.items()}
        for name, part in ({"loss": terms.per_sample.mean()} | named | auxiliary).items():
            sums[name] = sums.get(name, 0) + part.detach() / accumulation
        records.append(terms.routing)
    optimizer.step()
    return StepResult(sums, records)


def auxiliary_losses(records: list[RoutingRecord]) -> dict[str, Tensor]:
    """The routers' weighted losses by name, summed over the layers.

    The published code and configs sum the capacity loss too, where Eq. 12 divides by their
    number L.
    """
    sums: dict[str, Tensor] = {}
    for record in records:
        for name, loss in record.losses.items():
            sums[name] = sums.get(name, 0) + loss
    return sums
