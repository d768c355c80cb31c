"""Routing by prototypes (ProMoE): cosines to a vector of each expert, an expert for no condition.

Shapes: B batch, S tokens of one sample, T = B * S, D width of what the router reads, E routed
experts, K choices of a token, or tokens that an expert takes of a sample.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.promoe import ProMoEConfig
from core.precision import outside_autocast
from core.types import RouterContext, RoutingPlan, RoutingRecord
from models.moe.routers import first_weight, top_tokens

ABSENT = -1e9
"""Logit of an expert without tokens: none of the softmax is its own."""


class PrototypeRouter(nn.Module):
    """Cosines of tokens and prototypes choose, by token or by expert within a sample.

    Samples without a condition go whole to an expert of their own, the last one, where the
    config has it. The number of pairs depends on the shape of the batch alone: where samples
    with and without a condition differ in theirs, idle pairs make up the difference.

    Args:
        input_size: D.
        config: `num_experts`, `choice`, `top_k`, `score`, `unconditional_expert`, losses,
            `router_init`: published is N(0, 0.02).
    """

    def __init__(self, input_size: int, config: ProMoEConfig):
        super().__init__()
        self.config = config
        start = first_weight(config, partial(nn.init.normal_, std=0.02))
        self.prototypes = nn.Parameter(start(torch.empty(config.num_experts, input_size)))

    def forward(self, x: Tensor, context: RouterContext) -> tuple[RoutingPlan, RoutingRecord]:
        """Plan for `x` (B, S, D) and its record."""
        free = None
        if self.config.unconditional_expert:
            free = context.unconditional
            if free is None:
                free = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        with outside_autocast(x.device):
            tokens, prototypes = x.float(), self.prototypes.float()
            cosines = F.normalize(tokens, dim=-1) @ F.normalize(prototypes, dim=-1).T  # (B, S, E)
            route = self._by_token if self.config.choice == "token" else self._by_expert
            plan, losses = route(tokens, prototypes, cosines, free)
        record = RoutingRecord.of(plan, x, context)
        record.losses |= losses
        return plan, record

    def _by_token(
        self, tokens: Tensor, prototypes: Tensor, cosines: Tensor, free: Tensor | None
    ) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """Every token takes its top-k experts, weighted by their scores."""
        config, (_, S, E) = self.config, cosines.shape
        scores = self._scores(cosines, over=-1)
        gate, expert = (part.flatten(0, 1) for part in scores.topk(config.top_k, dim=-1))  # (T, K)
        losses = {}
        if self.training:
            losses = self._losses_by_token(tokens, prototypes, scores, expert, free)
        if free is None:
            return RoutingPlan.of_choices(gate, expert, E), losses
        alone = free.repeat_interleave(S)[:, None]  # (T, 1)
        first = torch.arange(config.top_k, device=alone.device) == 0
        # A sample without a condition has one pair for each token; the rest are idle.
        expert = torch.where(alone, torch.where(first, E, expert.roll(1, dims=1)), expert)
        gate = torch.where(alone, first.to(gate.dtype), gate)
        idle = alone & ~first if config.top_k > 1 else None
        return RoutingPlan.of_choices(gate, expert, E + 1, idle), losses

    def _losses_by_token(
        self,
        tokens: Tensor,
        prototypes: Tensor,
        scores: Tensor,
        expert: Tensor,
        free: Tensor | None,
    ) -> dict[str, Tensor]:
        """Of `scores` (B, S, E) and choices (T, K), the tokens of `free` samples left out."""
        config, (B, S, E) = self.config, scores.shape
        known = torch.ones_like(scores[:, :, 0]) if free is None else _known(free, S)  # (B, S)

        def table(choices: Tensor) -> Tensor:
            """(B, S, E) 1 where a token has the expert."""
            return torch.zeros_like(scores).view(-1, E).scatter_(1, choices, 1.0).view(B, S, E)

        losses = {}
        if config.contrastive_loss_weight > 0:
            member = table(expert if config.contrastive_top_k else expert[:, :1])
            member = (member * known[..., None]).flatten(0, 1).T  # (E, T)
            count = member.sum(dim=-1)
            means = member @ tokens.flatten(0, 1) / count.clamp(min=1)[:, None]
            loss = contrastive_loss(prototypes, means, count > 0, config.contrastive_temperature)
            losses["contrastive"] = config.contrastive_loss_weight * loss
        if config.balance_loss_weight > 0:
            share = scores if config.score == "softmax" else scores.softmax(dim=-1)
            loss = masked_balance(share, table(expert), known, config.balance_per_sample)
            losses["balance"] = config.balance_loss_weight * loss
        return losses

    def _by_expert(
        self, tokens: Tensor, prototypes: Tensor, cosines: Tensor, free: Tensor | None
    ) -> tuple[RoutingPlan, dict[str, Tensor]]:
        """Every expert takes its top tokens of each sample, weighted by their scores."""
        config, (S, E) = self.config, cosines.shape[1:]
        scores = self._scores(cosines, over=1).transpose(1, 2)  # (B, E, S)
        k = max(1, min(int(S / E * config.top_k), S))
        gate, index = scores.topk(k, dim=-1)  # (B, E, K)
        losses = {}
        if self.training and config.contrastive_loss_weight > 0:
            member = torch.zeros_like(scores).scatter_(2, index, 1.0 / k)
            present = torch.ones_like(scores[:, :, 0], dtype=torch.bool)
            means, heat = member @ tokens, config.contrastive_temperature  # (B, E, D)
            loss = contrastive_loss(prototypes, means, present, heat)  # (B,)
            known = torch.ones_like(loss) if free is None else (~free).to(loss.dtype)
            loss = (loss * known).sum() / known.sum().clamp(min=1)
            losses["contrastive"] = config.contrastive_loss_weight * loss
        if free is None:
            return top_tokens(scores, k), losses
        return _whole_or_routed(gate, index, free, S), losses

    def _scores(self, cosines: Tensor, over: int) -> Tensor:
        if self.config.score == "softmax":
            return cosines.softmax(dim=over)
        return cosines.sigmoid() if self.config.score == "sigmoid" else cosines


def _known(free: Tensor, tokens: int) -> Tensor:
    """(B, S) 1 for tokens of samples with a condition, else 0."""
    return (~free).float()[:, None].expand(-1, tokens)


def _whole_or_routed(gate: Tensor, index: Tensor, free: Tensor, tokens: int) -> RoutingPlan:
    """Samples with a condition as their experts chose, others whole to the expert after those.

    Args:
        gate: (B, E, K) weights.
        index: (B, E, K) tokens that each expert takes of each sample.
        free: (B,) samples without a condition.
        tokens: S.
    """
    B, E, K = gate.shape
    S, R, device = tokens, E * K, gate.device
    places, experts = torch.arange(S, device=device), torch.arange(E, device=device)
    # All pairs that a sample may have: R routed ones, then S of the expert of its own.
    expert = torch.cat([experts.repeat_interleave(K), torch.full_like(places, E)]).expand(B, -1)
    token = torch.cat([index.flatten(1), places.expand(B, -1)], dim=1)
    gate = torch.cat([gate.flatten(1), torch.ones_like(places, dtype=gate.dtype).expand(B, -1)], 1)
    # As many of them as either kind of sample needs; what is too many for one is idle there.
    P = max(R, S)
    order = torch.arange(P, device=device)
    pick = torch.where(free[:, None], (order + R) % (R + S), order)  # (B, P)
    idle = order >= torch.where(free, S, R)[:, None]
    gate = gate.gather(1, pick).masked_fill(idle, 0)
    token = token.gather(1, pick) + torch.arange(B, device=device)[:, None] * S
    return RoutingPlan.of_pairs(
        expert.gather(1, pick).flatten(), token.flatten(), gate.flatten(), E + 1, idle.flatten()
    )


def contrastive_loss(
    prototypes: Tensor, means: Tensor, present: Tensor, temperature: float
) -> Tensor:
    """Each prototype's cross-entropy of finding the mean of its own tokens among those of all.

    Experts without tokens are left out; with fewer than two left the loss is 0.

    Args:
        prototypes: (E, D).
        means: (..., E, D) of each expert's tokens, through which gradients flow as well.
        present: (..., E) bool, experts that have tokens.
        temperature: that cosines are divided by.

    Returns:
        (...) the mean over experts.
    """
    cosines = F.normalize(prototypes, dim=-1) @ F.normalize(means, dim=-1).transpose(-1, -2)
    logits = (cosines / temperature).masked_fill(~present[..., None, :], ABSENT)  # (..., E, E)
    own = -logits.log_softmax(dim=-1).diagonal(dim1=-2, dim2=-1)
    count = present.sum(dim=-1)
    mean = own.masked_fill(~present, 0).sum(dim=-1) / count.clamp(min=1)
    return torch.where(count > 1, mean, 0.0)


def masked_balance(share: Tensor, chosen: Tensor, known: Tensor, per_sample: bool) -> Tensor:
    """Load balance of the tokens of samples with a condition, 1 when balanced, 0 without any.

    Args:
        share: (B, S, E) softmax over experts.
        chosen: (B, S, E) 1 where the token chose the expert.
        known: (B, S) 1 for those tokens, else 0.
        per_sample: balance each sample, and take the mean; else all tokens together.
    """
    E = share.shape[-1]
    dims = (1,) if per_sample else (0, 1)
    weight = known[..., None]
    tokens = weight.sum(dim=dims).clamp(min=1)
    mean, chosen = (share * weight).sum(dim=dims) / tokens, (chosen * weight).sum(dim=dims)
    part = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1)
    loss = E * (mean * part).sum(dim=-1)
    return loss.sum() / known[:, 0].sum().clamp(min=1) if per_sample else loss
