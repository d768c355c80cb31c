"""The mixture-of-experts feed-forward layer."""

from torch import Tensor, nn

from core.types import RoutingRecord
from models.moe.dispatch import combine, gather
from models.moe.experts import Experts


class MoEFeedForward(nn.Module):
    """Router, experts and combine: (B, S, D) -> (B, S, D) and what the router did.

    Args:
        router: (B, S, D) -> (RoutingPlan, RoutingRecord).
        experts: computes the pairs of the plan.
    """

    def __init__(self, router: nn.Module, experts: Experts):
        super().__init__()
        self.router = router
        self.experts = experts

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingRecord]:
        tokens = x.flatten(0, 1)  # (B * S, D)
        plan, record = self.router(x)
        outputs = self.experts(gather(tokens, plan), plan)  # (N, D)
        return combine(outputs, plan, len(tokens)).view_as(x), record
