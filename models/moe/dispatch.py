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
    return _SegmentSum.apply(outputs.float(), plan.gate.float(), plan.token_index, num_tokens)


class _SegmentSum(torch.autograd.Function):
    """Weighted sums of the rows of each token; the gradient gathers what the token got."""

    @staticmethod
    def forward(outputs: Tensor, gate: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
        order = token_index.argsort(stable=True)
        counts = torch.zeros(num_tokens, dtype=torch.int64, device=order.device)
        counts.scatter_add_(0, token_index, torch.ones_like(token_index))
        ends = F.pad(counts.cumsum(0), (1, 0))  # (T + 1,) where the pairs of each token begin
        return F.embedding_bag(
            order,
            outputs,
            ends,
            mode="sum",
            per_sample_weights=gate[order],
            include_last_offset=True,
        )

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        outputs, gate, token_index, _ = inputs
        ctx.save_for_backward(outputs, gate, token_index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, gate, token_index = ctx.saved_tensors
        rows = grad.index_select(0, token_index)  # (N, D)
        return rows * gate[:, None], (rows * outputs).sum(dim=1), None, None


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
