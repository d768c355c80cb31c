"""State of the routers that follows the data, written once per optimizer step.

What a layer reports of a step is a row of E numbers: the quantiles of its capacity predictor
(Eq. 17), or the loads of its experts, from which a DeepSeek-style router balances itself. A router
with such a state names its keeper, which has

    state: Tensor                  the E numbers that are written
    state_name: str                what they are called in the log
    row(record) -> Tensor          what a record says of a step, (E,) float32
    next_state(row) -> Tensor      the state after a step with that row
"""

import torch
from torch import Tensor, nn

from core.distributed import Processes
from core.types import RoutingRecord
from models.dit import DiT


def keepers(model: DiT) -> list[nn.Module]:
    """What keeps the state of each MoE layer, in the order of the records; empty without any.

    Every layer of a model has the same kind of router, so that all keep a state or none.
    """
    routers = [layer.router for layer in model.moe_layers() if hasattr(layer, "router")]
    return [router.keeper for router in routers if getattr(router, "keeper", None) is not None]


def update(model: DiT, records: list[list[RoutingRecord]], processes: Processes) -> None:
    """Take one step of thresholds and biases: `reduce`, then `apply`."""
    device = next(model.parameters()).device
    rows, bad = reduce(model, records, torch.zeros((), device=device), processes)
    apply(model, rows, 1 - bad)


@torch.no_grad()
def reduce(
    model: DiT, records: list[list[RoutingRecord]], bad: Tensor, processes: Processes
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
    rows, keeping = torch.zeros(0, 0, device=bad.device), keepers(model)
    if keeping:
        layers = [
            torch.stack([keeper.row(record) for keeper, record in zip(keeping, micro, strict=True)])
            for micro in records
        ]
        rows = torch.stack(layers).mean(dim=0)  # (micro-batches, L, E) -> (L, E)
    both = processes.all_reduce_mean(torch.cat([rows.flatten(), bad.flatten()]))
    return both[:-1].view_as(rows), (both[-1] > 0).float()


@torch.no_grad()
def apply(model: DiT, rows: Tensor, finite: Tensor) -> None:
    """Write the state that follows from `rows`, where `finite` is 1.

    Args:
        model: without wrappers.
        rows: (L, E), what `reduce` gave.
        finite: scalar, 0 for a step that went wrong.
    """
    for keeper, row in zip(keepers(model), rows, strict=True):
        # Not a product with 0: the quantiles of a step that went wrong may be NaN.
        keeper.state.copy_(torch.where(finite > 0, keeper.next_state(row), keeper.state))
