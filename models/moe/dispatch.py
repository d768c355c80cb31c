"""Between tokens and (token, expert) pairs: gather, weighted sum, counting."""

import torch
from torch import Tensor

from core.types import RoutingPlan


def gather(tokens: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows (N, D) of `tokens` (T, D) in the order of the plan."""
    return tokens.index_select(0, plan.token_index)


def combine(outputs: Tensor, plan: RoutingPlan, num_tokens: int) -> Tensor:
    """Sum of the gated expert outputs of each token (Eq. 3 and 7), in float32.

    Args:
        outputs: (N, D) of the experts.
        plan: the pairs.
        num_tokens: T, all tokens; those that no expert took get zeros.

    Returns:
        (T, D) in the dtype of `outputs`.
    """
    weighted = outputs.float() * plan.gate.float()[:, None]
    total = weighted.new_zeros(num_tokens, outputs.shape[1])
    return total.index_add(0, plan.token_index, weighted).to(outputs.dtype)


def count_pairs(plan: RoutingPlan, batch: int, tokens_per_sample: int) -> Tensor:
    """(B, E) int64, how many tokens of each sample each expert takes."""
    E = len(plan.tokens_per_expert)
    cell = plan.token_index // tokens_per_sample * E + plan.expert_of_pair()
    counts = torch.zeros(batch * E, dtype=torch.int64, device=cell.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell)).view(batch, E)


def chosen_mask(plan: RoutingPlan, num_tokens: int) -> Tensor:
    """(T, E) float32, 1 where the expert takes the token (Eq. 13)."""
    E = len(plan.tokens_per_expert)
    mask = torch.zeros(num_tokens * E, device=plan.token_index.device)
    return mask.scatter_(0, plan.token_index * E + plan.expert_of_pair(), 1.0).view(num_tokens, E)
