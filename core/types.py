"""What travels between the parts: routing plans and records, model outputs, losses, objectives.

Shapes: B batch, S tokens of one sample, D width, E experts, N routed (token, expert) pairs,
C channels, H and W height and width of the latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from config.schema import SamplingConfig


@dataclass
class RoutingPlan:
    """Which token goes to which expert, as a flat list of pairs sorted by expert.

    Attributes:
        token_index: (N,) int64, positions in the (B * S) flattened tokens.
        gate: (N,) weight of the expert's output for that token.
        tokens_per_expert: (E,) int64, how many consecutive pairs belong to each expert.
        capacity: that count as a Python integer when it is the same for every expert, so that
            static-shape backends need no look at the device; None when counts vary.
        sizes: the counts as Python integers, where the host knows them; None elsewhere.
        pair_of_choice: (T * K,) where every one of T tokens has K pairs: the pair of its choice k
            is number `pair_of_choice[t * K + k]`; None elsewhere.
    """

    token_index: Tensor
    gate: Tensor
    tokens_per_expert: Tensor
    capacity: int | None
    sizes: list[int] | None = None
    pair_of_choice: Tensor | None = None

    def host_sizes(self) -> list[int]:
        """Pairs of each expert as Python integers; looks at the device if it has to."""
        if self.capacity is not None:
            return [self.capacity] * len(self.tokens_per_expert)
        return self.tokens_per_expert.tolist() if self.sizes is None else self.sizes

    def part(self, experts: slice, pairs: slice) -> "RoutingPlan":
        """The plan of some experts, whose pairs are these."""
        sizes = None if self.sizes is None else self.sizes[experts]
        return RoutingPlan(
            self.token_index[pairs],
            self.gate[pairs],
            self.tokens_per_expert[experts],
            self.capacity,
            sizes,
        )

    def expert_of_pair(self) -> Tensor:
        """(N,) the expert of each pair."""
        experts = torch.arange(len(self.tokens_per_expert), device=self.token_index.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=len(self.token_index))


@dataclass
class RoutingRecord:
    """What one MoE layer reports of one forward pass.

    Attributes:
        counts: (B, E) int64, pairs of each sample and expert; no gradient.
        num_tokens: tokens of one sample, S.
        num_context: the first so many of them are not of the image, but of its class.
        losses: auxiliary losses by name, scalars already multiplied by their weight.
        quantiles: (E,) k-th largest capacity prediction of each expert (Eq. 17), detached;
            None where the layer keeps no thresholds or is not training.
        capacity_logits: (B * S, E) output of the capacity predictor before the sigmoid, detached;
            None without one.
        capacity_targets: (B * S, E) 1 where the expert took the token (Eq. 13), or None.
        plan: which tokens went where, for maps over the image; its gates carry no gradient.
    """

    counts: Tensor
    num_tokens: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    quantiles: Tensor | None = None
    capacity_logits: Tensor | None = None
    capacity_targets: Tensor | None = None
    plan: RoutingPlan | None = None
    num_context: int = 0

    def token_mask(self, num_tokens: int) -> Tensor:
        """(T, E) 1 where the expert takes the token, of all T = B * S tokens."""
        return self._spread(torch.ones_like(self.plan.gate), num_tokens)

    def gates(self, num_tokens: int) -> Tensor:
        """(T, E) weight of the expert for the token, 0 where it does not take it."""
        return self._spread(self.plan.gate, num_tokens)

    def _spread(self, values: Tensor, num_tokens: int) -> Tensor:
        E = len(self.plan.tokens_per_expert)
        spread = values.new_zeros(num_tokens * E)
        cell = self.plan.token_index * E + self.plan.expert_of_pair()
        return spread.scatter_(0, cell, values).view(num_tokens, E)

    def capacity_per_sample(self) -> Tensor:
        """(B,) computed pairs per token of each sample: Eq. 8 averaged over the experts."""
        return self.counts.sum(dim=1) / self.num_tokens


@dataclass
class ModelOutput:
    """Result of a model: prediction (B, C_out, H, W) and one record per MoE layer, in order."""

    prediction: Tensor
    routing: list[RoutingRecord] = field(default_factory=list)


class Model(Protocol):
    """`x` (B, C, H, W), `t` (B,), `cond` whatever the model is conditioned on."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput: ...


@dataclass
class LossTerms:
    """Result of an objective.

    Attributes:
        per_sample: (B,) the loss to be averaged and minimised, without auxiliary losses.
        named: (B,) each part of it, for the log.
        routing: the model's records, handed on unread.
        noise_level: (B,) where on the path the samples were: 0 is data, 1 is noise.
    """

    per_sample: Tensor
    named: dict[str, Tensor]
    routing: list[RoutingRecord]
    noise_level: Tensor


Draw = Callable[[], Tensor]
"""A call returns fresh standard normal noise (B, C, H, W) of the samples being generated."""


class Objective(Protocol):
    """A way to train a model and to sample from it; conditions pass through untouched."""

    samplers: tuple[str, ...]

    def training_losses(
        self, model: Model, x: Tensor, cond: Tensor, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Loss on data `x` (B, C, H, W); times and noise are drawn from `generator`."""

    def time_of(self, u: Tensor) -> Tensor:
        """Training times (B,) from `u` (B,) uniform in [0, 1)."""

    def losses_at(
        self, model: Model, x: Tensor, cond: Tensor, t: Tensor, noise: Tensor
    ) -> LossTerms:
        """Loss at times `t` (B,) with given `noise` (B, C, H, W)."""

    def sample(
        self, model: Model, noise: Tensor, cond: Tensor, settings: "SamplingConfig", draw: Draw
    ) -> Tensor:
        """Data (B, C, H, W) from `noise` of that shape; `draw` serves stochastic samplers."""
