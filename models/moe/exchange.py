"""Experts that lie on several processes: tokens travel to them and back (expert parallelism).

Shapes: D width, E experts of a layer, P processes, N pairs of this process, M pairs that reach its
experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.tensor import DTensor

from core.types import RoutingPlan


class Exchange:
    """Carries rows between processes that hold E / P neighbouring experts each.

    All of them must call it alike: once there and back for each layer of a forward pass, and the
    backward pass goes the same way in reverse.

    Args:
        group: of the P processes.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.processes = dist.get_world_size(group)

    def deliver(self, rows: Tensor, plan: RoutingPlan) -> tuple[Tensor, RoutingPlan, "Way"]:
        """Send rows to the processes of their experts.

        Args:
            rows: (N, D), sorted by expert.
            plan: of all E experts.

        Returns:
            The rows (M, D) that came here, a plan of this process's E / P experts over them, and
            the way back.
        """
        counts = plan.tokens_per_expert.view(self.processes, -1)  # (P, E / P) from here
        arriving = all_to_all_single(counts.flatten(), None, None, self.group)
        arriving = arriving.view(self.processes, -1)  # (P, E / P) to here
        loads = arriving.sum(dim=0)  # (E / P,)
        sizes = torch.cat([counts.sum(dim=1), arriving.sum(dim=1), loads]).tolist()  # one look
        leaving, coming = sizes[: self.processes], sizes[self.processes : 2 * self.processes]
        way = Way(self.group, leaving, coming)
        rows = way.there(rows)
        # They come process by process; the experts want them expert by expert.
        local = torch.arange(arriving.shape[1], device=rows.device).repeat(self.processes)
        expert = local.repeat_interleave(arriving.flatten(), output_size=len(rows))  # (M,)
        ones = torch.ones(len(rows), device=rows.device)
        order = expert.argsort(stable=True)
        return rows, RoutingPlan(order, ones, loads, sizes[2 * self.processes :]), way


class Way:
    """How many rows go from this process to each other one, and come from there."""

    def __init__(self, group: dist.ProcessGroup, leaving: list[int], coming: list[int]):
        self.group, self.leaving, self.coming = group, leaving, coming

    def there(self, rows: Tensor) -> Tensor:
        """(N, D) -> (M, D), process by process."""
        return all_to_all_single_autograd(rows, self.coming, self.leaving, self.group)

    def back(self, rows: Tensor) -> Tensor:
        """(M, D) -> (N, D)."""
        return all_to_all_single_autograd(rows, self.leaving, self.coming, self.group)


class _Mean(torch.autograd.Function):
    """The identity, whose gradient is divided: those of all processes' losses arrive as a sum."""

    @staticmethod
    def forward(ctx, weight, processes):
        ctx.processes = processes
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad / ctx.processes, None


def own_part(weight: Tensor | None) -> Tensor | None:
    """The part of a stacked weight that this process computes with.

    Its gradient is that of the mean of the processes' losses, as that of all other weights.
    """
    if not isinstance(weight, DTensor):
        return weight
    return _Mean.apply(weight.to_local(), weight.device_mesh.size())
