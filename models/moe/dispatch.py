"""Between tokens and (token, expert) pairs: gather, weighted sum, parts of a plan."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from core.types import RoutingPlan


class Places(NamedTuple):
    """Where the pairs of each token lie in a plan.

    Attributes:
        order: (N,) pairs sorted by token, those of a token in the order of the experts.
        ends: (T + 1,) where the pairs of each token begin in that order.
    """

    order: Tensor
    ends: Tensor


def places_of(plan: RoutingPlan, num_tokens: int) -> Places:
    """Where the pairs of each of `num_tokens` tokens lie."""
    order = plan.token_index.argsort(stable=True)
    counts = torch.zeros(num_tokens, dtype=torch.int64, device=order.device)
    counts.scatter_add_(0, plan.token_index, torch.ones_like(plan.token_index))
    return Places(order, F.pad(counts.cumsum(0), (1, 0)))


def gather(tokens: Tensor, plan: RoutingPlan, places: Places) -> Tensor:
    """Rows (N, D) of `tokens` (T, D) in the order of the plan."""
    return take(tokens, plan.token_index, *places)


def combine(outputs: Tensor, plan: RoutingPlan, places: Places) -> Tensor:
    """Sum of the gated expert outputs of each token (Eq. 3 and 7), in float32.

    Pairs are sorted by token, and each token sums its own, in the order of the experts: the same
    way every time, on every device.

    Args:
        outputs: (N, D) of the experts, which are kept as they are for the backward pass.
        plan: the pairs.
        places: of the plan's tokens; those that no expert took get zeros.

    Returns:
        (T, D) float32.
    """
    return segment_sum(outputs, plan.gate.float(), plan.token_index, *places)


class GatheredProduct(torch.autograd.Function):
    """Tokens gathered for experts of equal counts, times each expert's weight, plus its bias.

    Of the gathered rows nothing is kept: the backward pass gathers them again, which costs far
    less than it saves. All in the precision of the tokens. Takes tokens (T, D), token_index,
    order and ends of the plan (see `Places`), weight (E, D, H), and bias (E, H) or None; gives
    (E, K, H) for N = E K pairs.
    """

    @staticmethod
    def forward(ctx, tokens, token_index, order, ends, weight, bias):
        ctx.save_for_backward(tokens, token_index, order, ends, weight)
        ctx.biased = bias is not None
        rows = _rows_of_experts(tokens, token_index, weight)
        return batched_product(rows, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        tokens, token_index, order, ends, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_tokens = of_weight = None
        if needs[0]:
            of_rows = torch.bmm(grad, weight.mT).flatten(0, 1)  # (N, D)
            of_tokens = sum_rows(of_rows, order, ends)
        if needs[4]:
            of_weight = torch.bmm(_rows_of_experts(tokens, token_index, weight).mT, grad)
        of_bias = grad.sum(dim=1) if ctx.biased else None
        return of_tokens, None, None, None, of_weight, of_bias


def _rows_of_experts(tokens: Tensor, token_index: Tensor, weight: Tensor) -> Tensor:
    return tokens.index_select(0, token_index).view(len(weight), -1, tokens.shape[1])


def batched_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (E, K, in) times weight (E, in, out) plus bias (E, out)."""
    if bias is None:
        return torch.bmm(x, weight)
    return torch.baddbmm(bias[:, None], x, weight)


class SegmentedProduct(torch.autograd.Function):
    """Rows of several experts, each expert's times its weight plus its bias; any counts.

    Every expert's part is written where it belongs: joining parts that were made one by one would
    copy outputs and gradients, those of all weights among them.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows: Tensor, sizes: list[int], weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(N, out).

        Args:
            ctx: for the backward pass.
            rows: (N, in), sorted by expert.
            sizes: rows of each expert.
            weight: (E, in, out), in the precision of the rows.
            bias: (E, out) or None.
        """
        ctx.save_for_backward(rows, weight)
        ctx.sizes, ctx.biased = sizes, bias is not None
        y = rows.new_empty(len(rows), weight.shape[2])
        for expert, (some, out) in enumerate(zip(rows.split(sizes), y.split(sizes), strict=True)):
            if bias is None:
                torch.mm(some, weight[expert], out=out)
            else:
                torch.addmm(bias[expert], some, weight[expert], out=out)
        return y

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        needs, parts = ctx.needs_input_grad, grad.split(ctx.sizes)
        of_rows = of_weight = of_bias = None
        if needs[0]:
            of_rows = torch.empty_like(rows)
            for out, part, one in zip(of_rows.split(ctx.sizes), parts, weight, strict=True):
                torch.mm(part, one.T, out=out)
        if needs[2]:
            of_weight = torch.empty_like(weight)
            for out, part, some in zip(of_weight, parts, rows.split(ctx.sizes), strict=True):
                torch.mm(some.T, part, out=out)
        if ctx.biased:
            of_bias = torch.stack([part.sum(dim=0) for part in parts])
        return of_rows, None, of_weight, of_bias


# Operators of our own: the library's gradients add by index, in any order on GPUs, and compiled
# graphs with any number of pairs take these as they are.


@torch.library.custom_op("diffmoe::sum_rows", mutates_args=())
def sum_rows(rows: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """(T, D) sums of the rows (N, D) of each token, added in float32 or wider."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums = F.embedding_bag(order, wide, ends, mode="sum", include_last_offset=True)
    return sums.to(rows.dtype)


@sum_rows.register_fake
def _(rows: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0] - 1, rows.shape[1])


@torch.library.custom_op("diffmoe::take", mutates_args=())
def take(tokens: Tensor, token_index: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """(N, D) rows of tokens (T, D); the gradient sums those of each token.

    Args:
        tokens: (T, D).
        token_index: (N,) the token of each row.
        order: see `Places`.
        ends: see `Places`.
    """
    return tokens.index_select(0, token_index)


@take.register_fake
def _(tokens: Tensor, token_index: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    return tokens.new_empty(token_index.shape[0], tokens.shape[1])


take.register_autograd(
    lambda ctx, grad: (sum_rows(grad, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[2:]),
)


@torch.library.custom_op("diffmoe::segment_sum", mutates_args=())
def segment_sum(
    outputs: Tensor, gate: Tensor, token_index: Tensor, order: Tensor, ends: Tensor
) -> Tensor:
    """(T, D) float32 weighted sums of the rows of each token; the gradient gathers.

    Args:
        outputs: (N, D).
        gate: (N,) float32 weights.
        token_index: (N,) the token of each row.
        order: see `Places`.
        ends: see `Places`.
    """
    return F.embedding_bag(
        *(order, outputs.float(), ends),
        mode="sum",
        per_sample_weights=gate[order],
        include_last_offset=True,
    )


@segment_sum.register_fake
def _(outputs: Tensor, gate: Tensor, token_index: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    return gate.new_empty(ends.shape[0] - 1, outputs.shape[1])


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    outputs, gate, token_index = ctx.saved_tensors
    rows = grad.index_select(0, token_index)  # (N, D)
    of_outputs = (rows * gate[:, None]).to(outputs.dtype)
    return of_outputs, (rows * outputs).sum(dim=1), None, None, None


segment_sum.register_autograd(
    _gradient, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3])
)


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
