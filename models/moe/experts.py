"""Expert MLPs as stacked weights, computed from a routing plan."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.types import RoutingPlan


class Experts(nn.Module):
    """E copies of DiT's MLP (biases, tanh-GELU) in one tensor per weight.

    Weights lie as (E, in, out), so that a batched product reads each expert's slice as it is.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.b1 = nn.Parameter(torch.empty(num_experts, intermediate_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.b2 = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each expert starts as DiT's MLP does: Xavier-uniform of its own slice, zero biases.

        `nn.init.xavier_uniform_` on the whole tensor would take the other experts for fan-in.
        """
        for weight in (self.w1, self.w2):
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            weight.uniform_(-bound, bound)
        self.b1.zero_()
        self.b2.zero_()

    def forward(self, x: Tensor, plan: RoutingPlan) -> Tensor:
        """Outputs (N, D) of the experts for their tokens `x` (N, D), sorted by expert."""
        if plan.capacity is not None:
            return self._batched(x, plan.capacity)
        return self._loop(x, plan.tokens_per_expert)

    def _batched(self, x: Tensor, capacity: int) -> Tensor:
        """Equal counts: one batched product for all experts, no look at the device."""
        E, D, _ = self.w1.shape
        h = torch.baddbmm(self.b1[:, None], x.view(E, capacity, D), self.w1)  # (E, K, H)
        y = torch.baddbmm(self.b2[:, None], F.gelu(h, approximate="tanh"), self.w2)  # (E, K, D)
        return y.view(E * capacity, D)

    def _loop(self, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Counts that vary, down to none: one expert after the other."""
        outputs = []
        for e, rows in enumerate(x.split(tokens_per_expert.tolist())):
            h = F.gelu(torch.addmm(self.b1[e], rows, self.w1[e]), approximate="tanh")
            outputs.append(torch.addmm(self.b2[e], h, self.w2[e]))
        return torch.cat(outputs)
