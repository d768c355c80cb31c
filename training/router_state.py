"""State of the routers that follows the data, written once per optimizer step."""

import torch
from torch import nn

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


@torch.no_grad()
def update(model: nn.Module, records: list[list[RoutingRecord]], processes: Processes) -> None:
    """Move the dynamic thresholds by one step of Eq. 17.

    The quantiles are averaged over the micro-batches of the step and, in one collective for all
    layers, over the processes: thresholds stay equal everywhere, and accumulation takes one step.

    Args:
        model: without wrappers.
        records: for each micro-batch of this process, the records of its layers.
        processes: all of which call this function.
    """
    predictors = capacity_predictors(model)
    if not predictors:
        return
    quantiles = torch.stack(
        [torch.stack([r.quantiles for r in layers]) for layers in records]
    ).mean(dim=0)  # (micro-batches, L, E) -> (L, E)
    processes.all_reduce_mean(quantiles)
    for predictor, quantile in zip(predictors, quantiles, strict=True):
        predictor.update_thresholds(quantile)
