"""The mixture-of-experts feed-forward layer."""

import dataclasses

from torch import Tensor, nn

from core.types import RoutingRecord
from models.moe.dispatch import combine, gather
from models.moe.experts import Experts


class MoEFeedForward(nn.Module):
    """Router, experts and combine: (B, S, D) -> (B, S, D) and what the router did.

    Args:
        router: (B, S, D) -> (RoutingPlan, RoutingRecord).
        experts: computes the pairs of the plan.
        shared: a dense layer that every token goes through besides, with weight 1; or None.
    """

    def __init__(self, router: nn.Module, experts: Experts, shared: nn.Module | None = None):
        super().__init__()
        self.router = router
        self.experts = experts
        self.shared = shared

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingRecord]:
        tokens = x.flatten(0, 1)  # (B * S, D)
        plan, record = self.router(x)
        record.plan = dataclasses.replace(plan, gate=plan.gate.detach())
        outputs = self.experts(gather(tokens, plan), plan)  # (N, D)
        y = combine(outputs, plan, len(tokens)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, record
