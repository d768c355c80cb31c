"""Between tokens and (token, expert) pairs: gather, weighted sum, parts of a plan."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core.types import RoutingPlan


def gather(tokens: Tensor, plan: RoutingPlan) -> Tensor:
    """Rows (N, D) of `tokens` (T, D) in the order of the plan."""
    return tokens.index_select(0, plan.token_index)


def combine(outputs: Tensor, plan: RoutingPlan, num_tokens: int) -> Tensor:
    """Sum of the gated expert outputs of each token (Eq. 3 and 7), in float32.

    Pairs are sorted by token, and each token sums its own, in the order of the experts: the same
    way every time, on every device.

    Args:
        outputs: (N, D) of the experts.
        plan: the pairs.
        num_tokens: T, all tokens; those that no expert took get zeros.

    Returns:
        (T, D) float32.
    """
    order = plan.token_index.argsort(stable=True)
    counts = torch.zeros(num_tokens, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, plan.token_index, torch.ones_like(plan.token_index))
    ends = F.pad(counts.cumsum(0), (1, 0))  # (T + 1,) where the pairs of each token begin
    return segment_sum(outputs.float(), plan.gate.float(), plan.token_index, order, ends)


@torch.library.custom_op("diffmoe::segment_sum", mutates_args=())
def segment_sum(
    outputs: Tensor, gate: Tensor, token_index: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    """Weighted sums of the rows of each token; the gradient gathers what the token got.

    An operator of its own, since the library's gradient of a bag adds by index, and so that
    compiled graphs with any number of pairs take it as it is.

    Args:
        outputs: (N, D).
        gate: (N,) weights.
        token_index: (N,) the token of each row.
        order: (N,) rows sorted by token.
        ends: (T + 1,) where the rows of each token begin in that order.
    """
    weights = gate[order]
    return F.embedding_bag(
        order, outputs, ends, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


@segment_sum.register_fake
def _shape(
    outputs: Tensor, gate: Tensor, token_index: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    return outputs.new_empty(ends.shape[0] - 1, outputs.shape[1])


def _keep(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    outputs, gate, token_index = ctx.saved_tensors
    rows = grad.index_select(0, token_index)  # (N, D)
    return rows * gate[:, None], (rows * outputs).sum(dim=1), None, None, None


segment_sum.register_autograd(_gradient, setup_context=_keep)


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
