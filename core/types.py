"""What travels between the parts: routing plans and records, model outputs, losses, objectives.

Shapes: B batch, S tokens of one sample, D width, E experts, N routed (token, expert) pairs,
C channels, H and W height and width of the latent.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from core.conditions import Condition


@dataclass
class RouterContext:
    """What a router may look at besides the modulated tokens; most need little of it.

    A fresh one says nothing; the model fills in what it knows, the block its tokens.

    Attributes:
        capacity: C that a schedule asks for at this training step; None: the config's.
        time: (B,) times as the objective counts them.
        unconditional: (B,) bool, samples on the unconditional side of guidance.
        condition: (B, D) vector that modulates the block.
        time_embedding: (B, D) its part that comes from the time alone, without class and text.
        tokens: (B, S, D) normalised, before they are modulated.
        grid: rows and columns of the image's tokens, which come last.
        num_context: tokens before them that are not of the image, but of its class.
    """

    capacity: float | None = None
    time: Tensor | None = None
    unconditional: Tensor | None = None
    condition: Tensor | None = None
    time_embedding: Tensor | None = None
    tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    num_context: int = 0


@dataclass
class RoutingPlan:
    """Which token goes to which expert, as a flat list of pairs sorted by expert.

    An expert takes a token once at most. N = sum of `tokens_per_expert`.

    Attributes:
        token_index: (N,) int64, positions in the (B * S) flattened tokens.
        gate: (N,) weight of the expert's output for that token.
        tokens_per_expert: (E,) int64, how many consecutive pairs belong to each expert.
        sizes: the same as Python integers, where the host knows them without a look at the device.
        idle: (N,) bool, pairs that only keep N from depending on data: computed with gate 0, and
            in no report; None for none.
    """

    token_index: Tensor
    gate: Tensor
    tokens_per_expert: Tensor
    sizes: list[int] | None = None
    idle: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.token_index, Tensor):  # a tree of something else in its shape
            return
        assert self.token_index.shape == self.gate.shape
        if self.sizes is not None:
            assert len(self.sizes) == len(self.tokens_per_expert)
            assert sum(self.sizes) == len(self.token_index)

    @classmethod
    def of_choices(
        cls, gate: Tensor, expert: Tensor, num_experts: int, idle: Tensor | None = None
    ) -> "RoutingPlan":
        """The plan in which every token goes to the experts that it chose, all different.

        Args:
            gate: (T, K) weights.
            expert: (T, K) int64.
            num_experts: E.
            idle: (T, K) bool, or None.
        """
        T, K = expert.shape
        token = torch.arange(T, device=expert.device).repeat_interleave(K)
        idle = None if idle is None else idle.flatten()
        return cls.of_pairs(expert.flatten(), token, gate.flatten(), num_experts, idle)

    @classmethod
    def of_pairs(
        cls,
        expert: Tensor,
        token: Tensor,
        gate: Tensor,
        num_experts: int,
        idle: Tensor | None = None,
    ) -> "RoutingPlan":
        """The plan of pairs in any order.

        Args:
            expert: (N,) int64.
            token: (N,) int64, positions in the flattened tokens.
            gate: (N,) weights.
            num_experts: E.
            idle: (N,) bool, or None.
        """
        order = expert.argsort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
        counts.scatter_add_(0, expert, torch.ones_like(expert))
        idle = None if idle is None else idle[order]
        return cls(token[order], gate[order], counts, idle=idle)

    @property
    def capacity(self) -> int | None:
        """The count of every expert where all are known to be equal, else None."""
        sizes = self.sizes
        return sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None

    def host_sizes(self) -> list[int]:
        """Pairs of each expert as Python integers; looks at the device if it has to."""
        return self.tokens_per_expert.tolist() if self.sizes is None else self.sizes

    def part(self, experts: slice, pairs: slice) -> "RoutingPlan":
        """The plan of some experts, whose pairs are these."""
        sizes = None if self.sizes is None else self.sizes[experts]
        counts = self.tokens_per_expert[experts]
        idle = None if self.idle is None else self.idle[pairs]
        return RoutingPlan(self.token_index[pairs], self.gate[pairs], counts, sizes, idle)

    def expert_of_pair(self) -> Tensor:
        """(N,) the expert of each pair."""
        experts = torch.arange(len(self.tokens_per_expert), device=self.token_index.device)
        return experts.repeat_interleave(self.tokens_per_expert, output_size=len(self.token_index))

    def counts(self, batch: int, tokens_per_sample: int) -> Tensor:
        """(B, E) int64, how many tokens of each sample each expert takes."""
        E = len(self.tokens_per_expert)
        cell = self.token_index // tokens_per_sample * E + self.expert_of_pair()
        counts = torch.zeros(batch * E, dtype=torch.int64, device=cell.device)
        each = torch.ones_like(cell) if self.idle is None else (~self.idle).to(cell.dtype)
        return counts.scatter_add_(0, cell, each).view(batch, E)

    def table(self, values: Tensor, num_tokens: int) -> Tensor:
        """(T, E) a value of each pair, `values` (N,), where the expert takes the token, else 0."""
        E = len(self.tokens_per_expert)
        if self.idle is not None:
            values = values.masked_fill(self.idle, 0)
        table = values.new_zeros(num_tokens * E)
        return table.scatter_(0, self.cells(), values).view(num_tokens, E)

    def cells(self) -> Tensor:
        """(N,) where each pair lies in a table (T, E), flattened."""
        return self.token_index * len(self.tokens_per_expert) + self.expert_of_pair()


@dataclass
class RoutingRecord:
    """What one MoE layer reports of one forward pass.

    Attributes:
        counts: (B, E) int64, pairs of each sample and expert; no gradient.
        num_tokens: tokens of one sample, S.
        num_context: the first so many of them are not of the image, but of its class.
        losses: auxiliary losses by name, scalars already multiplied by their weight.
        quantiles: (E,) k-th largest capacity prediction of each expert (Eq. 17), or score that
            won a race, detached; None where the layer keeps no thresholds or is not training.
        capacity_logits: (B * S, E) output of the capacity predictor before the sigmoid, detached;
            None without one.
        capacity_targets: (B * S, E) 1 where the expert took the token (Eq. 13), or None.
        plan: which tokens went where, for maps over the image; its gates carry no gradient.
        prediction: (B, S, F) what a head of the layer makes of the training target, which the
            trainer compares it with; None without a head or in evaluation.
        prediction_weight: of the mean squared error of that.
    """

    counts: Tensor
    num_tokens: int
    losses: dict[str, Tensor] = field(default_factory=dict)
    quantiles: Tensor | None = None
    capacity_logits: Tensor | None = None
    capacity_targets: Tensor | None = None
    plan: RoutingPlan | None = None
    num_context: int = 0
    prediction: Tensor | None = None
    prediction_weight: float = 0.0

    @classmethod
    def of(cls, plan: RoutingPlan, x: Tensor, context: RouterContext) -> "RoutingRecord":
        """The record of a plan for tokens `x` (B, S, D), for a router to add to."""
        B, S, _ = x.shape
        kept = replace(plan, gate=plan.gate.detach())
        return cls(plan.counts(B, S), S, plan=kept, num_context=context.num_context)

    def token_mask(self) -> Tensor:
        """(B * S, E) 1 where the expert takes the token."""
        return self.plan.table(torch.ones_like(self.plan.gate), len(self.counts) * self.num_tokens)

    def plr_loss(self, target: Tensor) -> Tensor:
        """Weighted error of the layer's own prediction of `target` (B, image tokens, F)."""
        error = self.prediction[:, self.num_context :] - target.to(self.prediction.dtype)
        return self.prediction_weight * error.square().mean()

    def capacity_per_sample(self) -> Tensor:
        """(B,) computed pairs per token of each sample: Eq. 8 averaged over the experts."""
        return self.counts.sum(dim=1) / self.num_tokens


@dataclass
class ModelOutput:
    """Result of a model: prediction (B, C_out, H, W) and one record per MoE layer, in order."""

    prediction: Tensor
    routing: list[RoutingRecord] = field(default_factory=list)


class Model(Protocol):
    """`x` (B, C, H, W), `t` (B,), `cond` of B samples."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput: ...


@dataclass
class LossTerms:
    """Result of an objective.

    Attributes:
        per_sample: (B,) the loss to be averaged and minimised, without auxiliary losses.
        named: (B,) each part of it, for the log.
        routing: the model's records, handed on unread.
        noise_level: (B,) where on the path the samples were: 0 is data, 1 is noise.
        target: (B, C, H, W) what the prediction is compared with.
    """

    per_sample: Tensor
    named: dict[str, Tensor]
    routing: list[RoutingRecord]
    noise_level: Tensor
    target: Tensor


Draw = Callable[[], Tensor]
"""A call returns fresh standard normal noise (B, C, H, W) of the samples being generated."""


class Objective(Protocol):
    """A way to train a model and to sample from it; conditions pass through untouched."""

    samplers: tuple[str, ...]

    def training_losses(
        self, model: Model, x: Tensor, cond: Condition, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Loss on data `x` (B, C, H, W); times and noise are drawn from `generator`."""

    def time_of(self, u: Tensor) -> Tensor:
        """Training times (B,) from `u` (B,) uniform in [0, 1)."""

    def losses_at(
        self, model: Model, x: Tensor, cond: Condition, t: Tensor, noise: Tensor
    ) -> LossTerms:
        """Loss at times `t` (B,) with given `noise` (B, C, H, W)."""

    def sample(
        self, model: Model, noise: Tensor, cond: Condition, settings: Any, draw: Draw
    ) -> Tensor:
        """Data (B, C, H, W) from `noise` of that shape.

        `settings` is a `config.objective.SamplingConfig`; `draw` serves stochastic samplers.
        """

    def data_of(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The data (B, C, H, W) that a prediction for `x` (B, C, H, W) stands for.

        `t` (B,) are times as a model is asked about them while it samples.
        """

    def bits_per_dim(
        self, model: Model, x: Tensor, cond: Condition, settings: Any, draw: Draw
    ) -> Tensor:
        """(B,) code length of data `x` (B, C, H, W), in bits for each of its numbers."""
