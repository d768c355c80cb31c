"""The mixture-of-experts feed-forward layer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.types import RouterContext, RoutingPlan, RoutingRecord
from models.moe.dispatch import chunks, combine, gather, places_of
from models.moe.exchange import Exchange
from models.moe.experts import Experts, product_dtype

ROW_BUDGET = 4
"""Pairs computed at once, in units of the tokens, or what the config asks for if that is more."""


def router_tokens(x: Tensor, context: RouterContext, kind: str) -> Tensor:
    """What a router reads of tokens `x` (B, S, D): `modulated` as they are, or `decoupled`.

    Decoupled (B, S, 2 D): the time's embedding, the same for all tokens of a sample, then the
    tokens before modulation, so that neither class nor text sways the choice directly.
    """
    if kind == "modulated":
        return x
    time = context.time_embedding[:, None].expand_as(context.tokens)
    return torch.cat([time, context.tokens], dim=-1)


class MoEFeedForward(nn.Module):
    """Router, experts and combine: (B, S, D) -> (B, S, D) and what the router did.

    Args:
        router: (B, S, D or 2 D), RouterContext -> (RoutingPlan, RoutingRecord).
        experts: computes the pairs of the plan.
        experts_per_token: experts that compute a token in training, on average.
        shared: a dense layer that every token goes through besides, with weight 1; or None.
        router_input: what the router reads, see `router_tokens`.

    Attributes:
        exchange: carries tokens to the experts of other processes; None if all are here.
    """

    role = "router"

    def __init__(
        self,
        router: nn.Module,
        experts: Experts,
        experts_per_token: float = 1.0,
        shared: nn.Module | None = None,
        router_input: str = "modulated",
    ):
        super().__init__()
        self.router = router
        self.experts = experts
        self.experts_per_token = experts_per_token
        self.shared = shared
        self.router_input = router_input
        self.exchange: Exchange | None = None
        if shared is not None:
            shared.role = "shared experts"

    def flops_per_token(self) -> float:
        """Of the forward pass in training, matrix products only: two for each weight at work."""
        routed = self.experts.w1.numel() + self.experts.w2.numel()
        others = [self.router] if self.shared is None else [self.router, self.shared]
        rest = sum(w.numel() for part in others for w in part.parameters() if w.dim() == 2)
        return 2 * (rest + routed * self.experts_per_token / len(self.experts.w1))

    def _routed(self, tokens: Tensor, plan: RoutingPlan) -> Tensor:
        """(T, D) float32 sum of the experts' outputs for `tokens` (T, D).

        When experts take many more tokens than the config says (a capacity schedule's start,
        fresh thresholds), they are computed a few at a time, and again in the backward pass: that
        costs time, not memory.
        """
        if self.exchange is not None:
            return self._exchanged(tokens, plan)
        budget = int(max(ROW_BUDGET, self.experts_per_token) * len(tokens))
        parts = chunks(plan, budget)
        if len(parts) <= 1:
            return self._chunk(tokens, plan, 0)
        total = tokens.new_zeros(tokens.shape, dtype=torch.float32)
        for experts, pairs in parts:
            part = plan.part(experts, pairs)
            if torch.is_grad_enabled():
                total = total + checkpoint(
                    self._chunk, tokens, part, experts.start, use_reentrant=False
                )
            else:
                total += self._chunk(tokens, part, experts.start)
        return total

    def _chunk(self, tokens: Tensor, plan: RoutingPlan, first: int) -> Tensor:
        places = places_of(plan, len(tokens))
        return combine(self.experts(tokens, plan, places, first), plan, places)

    def _exchanged(self, tokens: Tensor, plan: RoutingPlan) -> Tensor:
        """The same with experts on several processes, all at once, so that all exchange alike."""
        places = places_of(plan, len(tokens))
        rows = gather(tokens.to(product_dtype(tokens)), plan, places)  # (N, D)
        rows, local, way = self.exchange.deliver(rows, plan)  # (M, D)
        outputs = self.experts(rows, local, places_of(local, len(rows)))  # expert by expert
        arrived = outputs.index_select(0, local.token_index.argsort())  # process by process again
        outputs = way.back(arrived)
        return combine(outputs, plan, places)

    def forward(
        self, x: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord]:
        tokens = x.flatten(0, 1)  # (B * S, D)
        context = RouterContext() if context is None else context
        plan, record = self.router(router_tokens(x, context, self.router_input), context)
        y = self._routed(tokens, plan).to(product_dtype(x)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, record
