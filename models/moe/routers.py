"""Routers: from tokens to a plan of (token, expert) pairs, and what to report of it.

Shapes: B batch, S tokens of one sample, E experts, K choices, G pools of T tokens each
(G = B, T = S for the pool of a sample; G = 1, T = B * S for the pool of the batch).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.layers import ExpertChoiceConfig, MoEConfig, TokenChoiceConfig
from core.precision import outside_autocast
from core.types import RouterContext, RoutingPlan, RoutingRecord
from models.moe.capacity import CapacityPredictor, quantile_of_kth

SPREAD = 0.006
"""Standard deviation of a fresh expert-choice router, at any width, as published."""


def first_weight(
    config: MoEConfig, published: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """What fills the weight of a fresh router, by `router_init`."""
    return nn.init.xavier_uniform_ if config.router_init == "xavier" else published


class Affinity(nn.Module):
    """Token-expert affinity (Eq. 1): softmax over the experts or sigmoid, always in float32.

    Eq. 5 leaves the softmax out; Algorithm 3 has it, and so do we.

    Args:
        input_size: width of what the router reads.
        num_experts: E.
        start: fills the weight (E, input_size) of a fresh model.
        kind: `softmax` or `sigmoid`.
    """

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        start: Callable[[Tensor], Tensor],
        kind: str = "softmax",
    ):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(start(torch.empty(num_experts, input_size)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_size) -> (..., E)."""
        with outside_autocast(x.device):
            logits = F.linear(x.float(), self.weight.float())
            return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(dim=-1)


class TokenChoiceRouter(nn.Module):
    """Every token takes its top-k experts, weighted by affinity (Eq. 2, Algorithm 2).

    A fresh weight is uniform within 1 / sqrt(input_size), as the published TC-DiT draws it.

    Args:
        input_size: width of what the router reads.
        config: `num_experts`, `top_k`, `balance_loss_weight`, `router_init`.
    """

    def __init__(self, input_size: int, config: TokenChoiceConfig):
        super().__init__()
        published = partial(nn.init.kaiming_uniform_, a=5**0.5)
        start = first_weight(config, published)
        self.affinity = Affinity(input_size, config.num_experts, start)
        self.top_k = config.top_k
        self.balance_loss_weight = config.balance_loss_weight

    def forward(self, x: Tensor, context: RouterContext) -> tuple[RoutingPlan, RoutingRecord]:
        """Plan for `x` (B, S, D) and its record."""
        scores = self.affinity(x).flatten(0, 1)  # (B * S, E)
        gate, expert = scores.topk(self.top_k, dim=-1)  # (B * S, K)
        plan = RoutingPlan.of_choices(gate, expert, scores.shape[1])
        record = RoutingRecord.of(plan, x, context)
        if self.training and self.balance_loss_weight > 0:
            loss = balance_loss(scores, plan.tokens_per_expert)
            record.losses["balance"] = self.balance_loss_weight * loss
        return plan, record


def balance_loss(scores: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Load balance: E * sum_e P_e f_e, 1 when balanced (Fedus et al. 2021, Eq. 4).

    Args:
        scores: (T, E) affinities; P_e is their mean over the tokens.
        tokens_per_expert: (E,) choices; f_e is an expert's share of all choices.
    """
    share = tokens_per_expert.to(scores.dtype) / tokens_per_expert.sum()
    return scores.shape[1] * (scores.mean(dim=0) * share).sum()


class ExpertChoiceRouter(nn.Module):
    """Every expert takes its top tokens of a pool.

    The pool of a sample is EC-DiT (Algorithm 1); the pool of the batch with a capacity predictor
    is DiffMoE (Algorithm 3 in training, 4 in dynamic inference). With weights renormalised for
    each token, counts rounded up and a decoupled input it is Nucleus-Image's.

    Args:
        input_size: width of what the router reads.
        config: `num_experts`, `capacity`, `pool`, `inference` and their kin.
        predictor: learns the choice; None for plain expert choice.

    The context's capacity, where a schedule sets one, is C of training.
    """

    def __init__(
        self,
        input_size: int,
        config: ExpertChoiceConfig,
        predictor: CapacityPredictor | None = None,
    ):
        super().__init__()
        start = first_weight(config, partial(nn.init.normal_, std=SPREAD))
        self.affinity = Affinity(input_size, config.num_experts, start, config.scores)
        self.predictor = predictor
        self.config = config

    def forward(self, x: Tensor, context: RouterContext) -> tuple[RoutingPlan, RoutingRecord]:
        """Plan for `x` (B, S, D) and its record."""
        B, S, _ = x.shape
        pools, T = (B, S) if self.config.pool == "sample" else (1, B * S)
        scores = self.affinity(x)  # (B, S, E)
        E = scores.shape[-1]
        scores = scores.view(pools, T, E).transpose(1, 2)  # (G, E, T)
        logits = None if self.predictor is None else self.predictor(x.flatten(0, 1))
        if self.training or self.config.inference == "topk":
            plan = top_tokens(scores, self._tokens_per_expert(T, context.capacity))
        else:
            fixed = self.config.inference == "fixed"
            threshold = self.config.fixed_threshold if fixed else None
            counts = self.predictor.counts(logits.view(pools, T, E), threshold)  # (G, E)
            plan = top_tokens_varying(scores, counts)
        plan = self._weighted(plan, B * S)
        record = RoutingRecord.of(plan, x, context)
        if logits is not None:
            record.capacity_logits = logits.detach()
            if self.training:
                self._report_training(record, plan, logits)
        return plan, record

    @property
    def keeper(self) -> CapacityPredictor | None:
        """What keeps the router's state: the predictor, where there is one."""
        return self.predictor

    def _weighted(self, plan: RoutingPlan, tokens: int) -> RoutingPlan:
        """The plan with weights as the config wants them, of `tokens` in all."""
        gate = plan.gate
        if self.config.renormalise == "token":
            # By a table, in which every pair has its own place: sums by index depend on the order.
            table = plan.table(gate, tokens)  # (T, E)
            share = table / (table.sum(dim=1, keepdim=True) + 1e-12)
            gate = share.flatten().gather(0, plan.cells())
        return replace(plan, gate=self.config.route_scale * gate)

    def _tokens_per_expert(self, tokens: int, scheduled: float | None) -> int:
        """k of a pool of `tokens`: Eq. 8 solved for it, and rounded."""
        capacity, experts = self.config.capacity, self.config.num_experts
        if not self.training:
            capacity = self.config.inference_capacity or capacity
        elif scheduled is not None:
            capacity = scheduled
        if self.config.round_share_first:
            return int(tokens / experts * capacity)
        # Multiplied first, a whole number is exact.
        share = tokens * capacity / experts
        return min(tokens, math.ceil(share) if self.config.rounding == "up" else int(share))

    def _report_training(self, record: RoutingRecord, plan: RoutingPlan, logits: Tensor) -> None:
        target = record.token_mask().to(logits.dtype)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        record.losses["capacity"] = self.config.capacity_loss_weight * loss
        record.capacity_targets = target
        record.quantiles = quantile_of_kth(logits, plan.capacity)


def top_tokens(scores: Tensor, k: int) -> RoutingPlan:
    """Each expert's `k` best tokens of each pool: scores (G, E, T)."""
    G, E, T = scores.shape
    gate, index = scores.topk(k, dim=-1, sorted=False)  # (G, E, k)
    token_index = _flat_index(index, T)
    tokens_per_expert = torch.full((E,), G * k, device=scores.device)
    return RoutingPlan(token_index, gate.transpose(0, 1).flatten(), tokens_per_expert, [G * k] * E)


def top_tokens_varying(scores: Tensor, counts: Tensor) -> RoutingPlan:
    """Each expert's best tokens of each pool, `counts` (G, E) many: scores (G, E, T)."""
    T = scores.shape[-1]
    per_pool = counts.tolist()  # the one look at the device
    most, sizes = max(map(max, per_pool)), [sum(column) for column in zip(*per_pool, strict=True)]
    gate, index = scores.topk(most, dim=-1)  # (G, E, most), the best first
    keep = torch.arange(most, device=scores.device) < counts[..., None]
    # (G, E, most) -> (E, G, most) -> flat, so that pairs are sorted by expert.
    keep = keep.transpose(0, 1).flatten()
    kept = torch.nonzero_static(keep, size=sum(sizes)).squeeze(1)
    token_index = _flat_index(index, T)[kept]
    gate = gate.transpose(0, 1).flatten()[kept]
    return RoutingPlan(token_index, gate, counts.sum(0), sizes)


def _flat_index(index: Tensor, tokens_in_pool: int) -> Tensor:
    """Positions (G, E, k) within pools to positions among all tokens, flat and by expert."""
    offset = torch.arange(index.shape[0], device=index.device) * tokens_in_pool
    return (index + offset[:, None, None]).transpose(0, 1).flatten()
