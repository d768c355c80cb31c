"""DeepSeek-style routing (DeepSeek-V3, Liu et al. 2024, Sec. 2.1.2), as DSMoE and JiTMoE have it.

Shapes: B batch, S tokens of one sample, T = B * S, E experts, G groups of E / G experts, K choices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.layers import DeepSeekConfig
from core.precision import outside_autocast
from core.types import RouterContext, RoutingPlan, RoutingRecord
from models.moe.routers import first_weight

BEST_OF_GROUP = 2
"""A group counts as the sum of so many best scores."""


class DeepSeekRouter(nn.Module):
    """Every token takes its top-k experts by sigmoid affinity plus a bias that balances them.

    The bias decides the choice only; the weights are the affinities. It belongs to the model's
    state, and the forward never writes it: the trainer does, once per step.

    Args:
        input_size: width of what the router reads.
        config: `num_experts`, `top_k`, groups, `routed_scaling_factor`, `bias_update_rate`,
            `router_init`: published is normal with variance 2 / input_size.
    """

    correction_bias: Tensor
    state_name = "correction_bias"

    def __init__(self, input_size: int, config: DeepSeekConfig):
        super().__init__()
        self.config = config
        start = first_weight(config, nn.init.kaiming_normal_)
        self.weight = nn.Parameter(start(torch.empty(config.num_experts, input_size)))
        self.register_buffer("correction_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, context: RouterContext) -> tuple[RoutingPlan, RoutingRecord]:
        """Plan for `x` (B, S, D) and its record."""
        with outside_autocast(x.device):
            scores = F.linear(x.float(), self.weight.float()).sigmoid().flatten(0, 1)  # (T, E)
        expert = self.choose(scores.detach() + self.correction_bias)  # (T, K)
        gate = scores.gather(1, expert)
        if self.config.top_k > 1:
            gate = gate / (gate.sum(dim=1, keepdim=True) + 1e-20)
        gate = gate * self.config.routed_scaling_factor
        plan = RoutingPlan.of_choices(gate, expert, scores.shape[1])
        return plan, RoutingRecord.of(plan, x, context)

    def choose(self, scores: Tensor) -> Tensor:
        """Experts (T, K) of the best `scores` (T, E) in the best groups."""
        config = self.config
        if config.top_k_groups < config.num_groups:
            groups = scores.view(len(scores), config.num_groups, -1)  # (T, G, E / G)
            value = groups.topk(min(BEST_OF_GROUP, groups.shape[2]), dim=2).values.sum(dim=2)
            best = value.topk(config.top_k_groups, dim=1).indices
            outside = torch.ones_like(value, dtype=torch.bool).scatter_(1, best, False)
            fill = 0.0 if config.zero_masked_groups else float("-inf")
            scores = groups.masked_fill(outside[:, :, None], fill).flatten(1)
        return scores.topk(config.top_k, dim=1).indices

    @property
    def keeper(self) -> "DeepSeekRouter":
        """The router keeps its state itself."""
        return self

    @property
    def state(self) -> Tensor:
        """What the trainer writes: the bias."""
        return self.correction_bias

    def row(self, record: RoutingRecord) -> Tensor:
        """(E,) loads of a step, in tokens of a sample."""
        return record.counts.sum(dim=0) / len(record.counts)

    def next_state(self, loads: Tensor) -> Tensor:
        """The bias after one step against the imbalance of `loads` (E,).

        Wang et al. 2024, Algorithm 1; centred, since a common shift would change no choice.
        """
        step = self.config.bias_update_rate * (loads.mean() - loads).sign()
        return self.correction_bias + (step - step.mean()).to(self.correction_bias)
