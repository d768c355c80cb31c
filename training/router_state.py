"""State of the routers that follows the data, written once per optimizer step.

What a layer reports of a step is a row of E numbers: the quantiles of its capacity predictor
(Eq. 17), or the loads of its experts, from which a DeepSeek-style router balances itself.
"""

import torch
from torch import Tensor, nn

from config.schema import ExpertChoiceConfig
from core.distributed import Processes
from core.types import RoutingRecord
from models.moe.capacity import CapacityPredictor
from models.moe.deepseek import DeepSeekRouter
from models.moe.routers import ExpertChoiceRouter


def capacity_predictors(model: nn.Module) -> list[CapacityPredictor]:
    """The predictors of a model, in the order of its routing records."""
    return [m for m in model.modules() if isinstance(m, CapacityPredictor)]


def keepers(model: nn.Module) -> list[CapacityPredictor | DeepSeekRouter]:
    """The parts of a model that keep such a state, in the order of its routing records."""
    kinds = CapacityPredictor, DeepSeekRouter
    return [m for m in model.modules() if isinstance(m, kinds)]


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
    """Take one step of thresholds and biases: `reduce`, then `apply`."""
    device = next(model.parameters()).device
    rows, bad = reduce(model, records, torch.zeros((), device=device), processes)
    apply(model, rows, 1 - bad)


@torch.no_grad()
def reduce(
    model: nn.Module, records: list[list[RoutingRecord]], bad: Tensor, processes: Processes
) -> tuple[Tensor, Tensor]:
    """What the layers report of a step, and whether it went wrong anywhere.

    The rows are averaged over the micro-batches of the step and, in one collective for all
    layers, over the processes: the state stays equal everywhere, and accumulation takes one step.

    Args:
        model: without wrappers.
        records: for each micro-batch of this process, the records of its layers.
        bad: scalar, 1 if the step went wrong on this process, else 0.
        processes: all of which call this function.

    Returns:
        (L, E) rows, (0, 0) for a model whose routers keep no state, and the scalar 1 or 0.
    """
    rows = torch.zeros(0, 0, device=bad.device)
    if keepers(model):
        layers = [torch.stack([_row(r) for r in micro]) for micro in records]
        rows = torch.stack(layers).mean(dim=0)  # (micro-batches, L, E) -> (L, E)
    both = processes.all_reduce_mean(torch.cat([rows.flatten(), bad.flatten()]))
    return both[:-1].view_as(rows), (both[-1] > 0).float()


def _row(record: RoutingRecord) -> Tensor:
    """(E,) float32 quantiles, or loads in tokens of a sample."""
    if record.quantiles is not None:
        return record.quantiles.float()
    return record.counts.sum(dim=0) / len(record.counts)


@torch.no_grad()
def apply(model: nn.Module, rows: Tensor, finite: Tensor) -> None:
    """Write the state that follows from `rows`, where `finite` is 1.

    Args:
        model: without wrappers.
        rows: (L, E), what `reduce` gave.
        finite: scalar, 0 for a step that went wrong.
    """
    for keeper, row in zip(keepers(model), rows, strict=True):
        # Not a product with 0: the quantiles of a step that went wrong may be NaN.
        keeper.state.copy_(torch.where(finite > 0, keeper.next_state(row), keeper.state))
