"""State of the routers that follows the data, written once per optimizer step."""

import torch
from torch import Tensor, nn

from config.schema import ExpertChoiceConfig
from core.distributed import Processes
from core.types import RoutingRecord
from models.moe.capacity import CapacityPredictor
from models.moe.routers import ExpertChoiceRouter


def capacity_predictors(model: nn.Module) -> list[CapacityPredictor]:
    """The predictors of a model, in the order of its routing records."""
    return [m for m in model.modules() if isinstance(m, CapacityPredictor)]


def begin_step(model: nn.Module, step: int) -> None:
    """Set the training capacity that the schedules ask for at optimizer step `step` (from 0)."""
    for router in model.modules():
        if isinstance(router, ExpertChoiceRouter):
            router.training_capacity = scheduled_capacity(router.config, step)


def scheduled_capacity(config: ExpertChoiceConfig, step: int) -> float:
    """C of training at optimizer step `step`: all experts at first, then down to `capacity`."""
    if config.capacity_schedule is None:
        return config.capacity
    first, second = config.capacity_schedule
    rest = min(1.0, max(0.0, (second - step) / (second - first)))
    return config.capacity + (config.num_experts - config.capacity) * rest


def update(model: nn.Module, records: list[list[RoutingRecord]], processes: Processes) -> None:
    """Move the dynamic thresholds by one step of Eq. 17: `reduce`, then `apply`."""
    device = next(model.parameters()).device
    quantiles, bad = reduce(model, records, torch.zeros((), device=device), processes)
    apply(model, quantiles, 1 - bad)


@torch.no_grad()
def reduce(
    model: nn.Module, records: list[list[RoutingRecord]], bad: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    """Quantiles (L, E) of a step, and whether it went wrong anywhere.

    The quantiles are averaged over the micro-batches of the step and, in one collective for all
    layers, over the processes: thresholds stay equal everywhere, and accumulation takes one step.

    Args:
        model: without wrappers.
        records: for each micro-batch of this process, the records of its layers.
        bad: scalar, 1 if the step went wrong on this process, else 0.
        processes: all of which call this function.

    Returns:
        (L, E) quantiles, (0, 0) for a model without predictors, and the scalar 1 or 0.
    """
    quantiles = torch.zeros(0, 0, device=bad.device)
    if capacity_predictors(model):
        layers = [torch.stack([r.quantiles for r in micro]) for micro in records]
        quantiles = torch.stack(layers).float().mean(dim=0)  # (micro-batches, L, E) -> (L, E)
    both = processes.all_reduce_mean(torch.cat([quantiles.flatten(), bad.flatten()]))
    return both[:-1].view_as(quantiles), (both[-1] > 0).float()


@torch.no_grad()
def apply(model: nn.Module, quantiles: Tensor, finite: Tensor) -> None:
    """Move the thresholds towards `quantiles` (L, E) where `finite` is 1."""
    for predictor, quantile in zip(capacity_predictors(model), quantiles, strict=True):
        # Not a product with 0: the quantiles of a step that went wrong may be NaN.
        kept = torch.where(finite > 0, quantile, predictor.thresholds)
        predictor.update_thresholds(kept)
