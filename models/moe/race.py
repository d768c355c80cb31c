"""Expert Race (Yuan et al. 2025): one top-k over the pairs of all tokens and all experts.

Shapes: B batch, S tokens of one sample, T = B * S, D width, E experts, K pairs of one selection.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.race import RaceConfig
from core.precision import outside_autocast
from core.types import RouterContext, RoutingPlan, RoutingRecord

GATES = {
    "identity": lambda logits: logits,
    "sigmoid": torch.sigmoid,
    "softmax": lambda logits: logits.softmax(dim=-1),
}


class RaceRouter(nn.Module):
    """A two-layer router whose best logits win, whatever token and expert they belong to.

    A token gets any number of experts, k on average. In evaluation a pair takes part if it
    reaches the threshold that the race had in training, so that a sample is computed the same
    in any batch. The thresholds belong to the model's state, and the forward never writes them:
    the trainer does, once per step. There is one for each layer, held E times; pools of one
    expert have one for each expert.

    A second head on the same hidden features predicts the training target, in training alone:
    the per-layer regularisation, which the trainer completes, since it knows the target.

    Args:
        input_size: width of what the router reads.
        hidden_size: D.
        config: `num_experts`, `top_k`, `pool`, `gate`, `inference` and the weights of the losses.
        target_size: numbers of the training target for each token.
    """

    thresholds: Tensor
    state_name = "thresholds"

    def __init__(self, input_size: int, hidden_size: int, config: RaceConfig, target_size: int):
        super().__init__()
        self.config = config
        self.hidden = nn.Linear(input_size, hidden_size)
        self.gate = nn.Linear(hidden_size, config.num_experts)
        regularised = config.plr_loss_weight > 0
        self.target = nn.Linear(hidden_size, target_size) if regularised else None
        self.register_buffer("thresholds", torch.zeros(config.num_experts))

    def forward(self, x: Tensor, context: RouterContext) -> tuple[RoutingPlan, RoutingRecord]:
        """Plan for `x` (B, S, input_size) and its record."""
        hidden = F.gelu(self.hidden(x))  # (B, S, D)
        with outside_autocast(x.device):
            logits = self.gate(hidden.to(self.gate.weight.dtype)).float()  # (B, S, E)
        scores = GATES[self.config.gate](logits)
        if not self.training and self.config.inference == "threshold":
            plan = reaching(scores, self.thresholds)
            return plan, RoutingRecord.of(plan, x, context)
        plan, kth = race(scores, self.config.pool, self.config.top_k)
        record = RoutingRecord.of(plan, x, context)
        if self.training:
            record.quantiles = kth
            if self.config.similarity_loss_weight > 0:
                loss = similarity_loss(logits.flatten(0, 1), record.token_mask())
                record.losses["similarity"] = self.config.similarity_loss_weight * loss
            if self.target is not None:
                record.prediction = self.target(hidden).float()
                record.prediction_weight = self.config.plr_loss_weight
        return plan, record

    @property
    def keeper(self) -> "RaceRouter":
        """The router keeps its state itself."""
        return self

    @property
    def state(self) -> Tensor:
        """What the trainer writes: the thresholds."""
        return self.thresholds

    def row(self, record: RoutingRecord) -> Tensor:
        """(E,) smallest scores that won in a step."""
        return record.quantiles.float()

    def next_state(self, kth: Tensor) -> Tensor:
        """Thresholds after one step towards `kth` (E,)."""
        return self.thresholds.lerp(kth.to(self.thresholds), 1 - self.config.threshold_decay)


def race(scores: Tensor, pool: str, top_k: int) -> tuple[RoutingPlan, Tensor]:
    """The best pairs of each selection, of `top_k` for each token together.

    How many pairs there are depends on the shapes alone; which experts have them, on the scores.

    Args:
        scores: (B, S, E), which are the weights too.
        pool: whose pairs compete in one selection; see `RaceConfig`.
        top_k: experts of a token on average.

    Returns:
        The plan, and (E,) the smallest score that won, detached: the mean over the selections, or
        over those of each expert where a selection is of one expert.
    """
    B, S, E = scores.shape
    by_expert = scores.permute(2, 0, 1)  # (E, B, S)
    pairs = torch.arange(scores.numel(), device=scores.device).view(E, B, S)
    contests = _selections(by_expert, pool)  # (selections, candidates)
    K = max(1, B * S * top_k // len(contests))
    best = contests.topk(K, dim=1, sorted=False)
    won = _selections(pairs, pool).gather(1, best.indices).flatten().sort().values  # by expert
    counts = torch.zeros(E, dtype=torch.int64, device=scores.device)
    expert = won // (B * S)
    counts.scatter_add_(0, expert, torch.ones_like(expert))
    of_one = pool.startswith("expert")
    sizes = [len(contests) // E * K] * E if of_one else None
    kth = best.values.detach().amin(dim=1)
    kth = kth.view(E, -1).mean(dim=1) if of_one else kth.mean().expand(E)
    plan = RoutingPlan(won % (B * S), by_expert.flatten().gather(0, won), counts, sizes)
    return plan, kth


def _selections(values: Tensor, pool: str) -> Tensor:
    """Values of all pairs (E, B, S) as (selections, candidates of each)."""
    E, B, S = values.shape
    if pool == "batch":
        return values.reshape(1, -1)
    if pool == "sample":
        return values.transpose(0, 1).reshape(B, -1)
    if pool == "position":
        return values.permute(2, 0, 1).reshape(S, -1)
    if pool == "token":
        return values.permute(1, 2, 0).reshape(B * S, E)
    return values.reshape(E if pool == "expert_batch" else E * B, -1)


def reaching(scores: Tensor, thresholds: Tensor) -> RoutingPlan:
    """All pairs whose score (B, S, E) is at least the threshold (E,): no token sees another."""
    B, S, E = scores.shape
    by_expert = scores.permute(2, 0, 1).reshape(E, B * S)
    above = by_expert >= thresholds[:, None]
    counts = above.sum(dim=1)
    sizes = counts.tolist()  # the one look at the device
    won = torch.nonzero_static(above.flatten(), size=sum(sizes)).squeeze(1)
    return RoutingPlan(won % (B * S), by_expert.flatten()[won], counts, sizes)


def similarity_loss(logits: Tensor, taken: Tensor) -> Tensor:
    """Router similarity: experts that are alike cost the more, the more tokens they share.

    1 where all experts are alike to the router and the load is balanced.

    Args:
        logits: (T, E); the gradient flows through their similarity alone.
        taken: (T, E) 1 where the expert takes the token.
    """
    T, E = logits.shape
    with outside_autocast(logits.device), torch.no_grad():
        together = taken.mT @ taken  # (E, E) tokens that two experts both have
        own = together.diagonal()
        shared = together - own.diag()
        weight = (E * own / own.sum().clamp(min=1)).diag()
        weight = weight + (E * E - E) * shared / shared.sum().clamp(min=1)
    with outside_autocast(logits.device):
        p = logits.softmax(dim=-1)
        return (weight * (p.mT @ p)).sum() / T
