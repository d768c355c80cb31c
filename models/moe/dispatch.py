"""Between tokens and (token, expert) pairs: gather, weighted sum, counting."""

import torch
from torch import Tensor

from core.types import RoutingPlan


def gather(tokens: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows (N, D) of `tokens` (T, D) in the order of the plan."""
    return tokens.index_select(0, plan.token_index)


def combine(outputs: Tensor, plan: RoutingPlan, num_tokens: int) -> Tensor:
    """Sum of the gated expert outputs of each token (Eq. 3 and 7), in float32.

    Where every token has as many pairs, its pairs are put side by side and summed, the same way
    every time. Elsewhere pairs are added where they belong; on a GPU their order is not fixed,
    except without gradients, where the experts follow each other.

    Args:
        outputs: (N, D) of the experts.
        plan: the pairs.
        num_tokens: T, all tokens; those that no expert took get zeros.

    Returns:
        (T, D) float32.
    """
    if plan.pair_of_choice is not None:
        chosen = outputs.index_select(0, plan.pair_of_choice).view(num_tokens, -1, outputs.shape[1])
        gate = plan.gate.index_select(0, plan.pair_of_choice).view(num_tokens, -1, 1)
        return (chosen.float() * gate.float()).sum(dim=1)  # over (T, K, D)
    weighted = outputs.float() * plan.gate.float()[:, None]
    total = weighted.new_zeros(num_tokens, outputs.shape[1])
    if weighted.is_cuda and not torch.is_grad_enabled():
        sizes = plan.host_sizes()
        for index, part in zip(plan.token_index.split(sizes), weighted.split(sizes), strict=True):
            total.index_add_(0, index, part)  # an expert takes a token once: no two collide
        return total
    return total.index_add(0, plan.token_index, weighted)


def chunks(plan: RoutingPlan, budget: int) -> list[tuple[slice, slice]]:
    """Consecutive experts, and their pairs, such that no chunk has more than `budget` pairs.

    An expert that alone has more is a chunk by itself. One chunk, without a look at the device,
    if all pairs fit.
    """
    everything = slice(0, len(plan.tokens_per_expert)), slice(0, len(plan.token_index))
    if len(plan.token_index) <= budget:
        return [everything]
    found, first, start, end = [], 0, 0, 0
    for expert, size in enumerate(plan.host_sizes()):
        if end + size - start > budget and expert > first:
            found.append((slice(first, expert), slice(start, end)))
            first, start = expert, end
        end += size
    return [*found, (slice(first, everything[0].stop), slice(start, end))]


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
