"""Where the computation goes while a model samples, recorded by a wrapper around it.

Shapes: B samples, S tokens of one sample's image, T evaluations of the model, L MoE layers,
E experts, K classes or prompts. A half is the conditional (0) or the unconditional side (1) of
guidance; what is said of single tokens is of the conditional half.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.conditions import Condition
from core.errors import UserError
from core.types import Model, ModelOutput, RoutingRecord

HALVES = 2
MAPS = 8
"""Samples of the set whose tokens are mapped."""


@dataclass
class Routing:
    """Which experts computed each token of some samples, at each evaluation.

    Attributes:
        times: (T,) of the evaluations, in their order, as the objective counts them.
        capacity: (T, 2, L, B) experts per token of each sample, C_infer of the layer; NaN where a
            half was not computed.
        chosen: of each layer (T, B, S, ceil(E / 8)) uint8, the experts of each token of the image
            as bits (`np.packbits`), in the conditional half; None for a layer without a plan.
        num_experts: E, those that no router chooses included.
    """

    times: np.ndarray
    capacity: np.ndarray
    chosen: list[np.ndarray | None]
    num_experts: int

    def experts(self, layer: int) -> np.ndarray | None:
        """(T, B, S, E) bool, which experts each token had; None for a layer without a plan."""
        bits = self.chosen[layer]
        return None if bits is None else np.unpackbits(bits, -1, self.num_experts).astype(bool)

    def numbers(self, layer: int | None = None) -> np.ndarray | None:
        """(T, B, S) float32, how many experts each token had.

        Args:
            layer: its number from 0; None: the mean over those with a plan.

        Returns:
            None where no such layer has a plan.
        """
        layers = self.chosen if layer is None else [self.chosen[layer]]
        maps = [
            np.bitwise_count(bits).sum(-1, dtype=np.float32) for bits in layers if bits is not None
        ]
        return np.mean(maps, axis=0) if maps else None

    def spent(self) -> np.ndarray:
        """(B,) C_infer of each sample: the mean over layers, evaluations and halves (Eq. 15)."""
        return np.nanmean(self.capacity.mean(axis=2), axis=(0, 1))


class RoutingRecorder:
    """Counts of token-expert pairs by evaluation, half, layer, sample and expert.

    Args:
        model: what is called, on whole batches of the samples or on both halves joined.
        batch_size: B.
        detailed: keep which experts each token had, too.
    """

    def __init__(self, model: Model, batch_size: int, detailed: bool = False):
        self.model, self.batch_size, self.detailed = model, batch_size, detailed
        self.chosen: list[list[np.ndarray | None]] = []
        self.times: list[float] = []
        self.counts: list[list[Tensor | None]] = []
        self.maps: list[Tensor] = []
        self.tokens: list[int] = []
        self.conditional = False
        """Whether the last call was a conditional half alone."""

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput:
        output = self.model(x, t, cond)
        if not output.routing:
            return output
        counts = torch.stack([record.counts for record in output.routing])  # (L, B or 2B, E)
        self.tokens = [record.num_tokens for record in output.routing]
        free = cond.free is not None and bool(cond.free.all())
        if free and self.conditional:  # the other half of the call before
            self.counts[-1][1] = counts
            self.conditional = False
            return output
        self.conditional = not free
        sides = [*counts.split(self.batch_size, dim=1), None]
        self.conditional &= len(x) == self.batch_size
        self.times.append(float(t[0]))
        self.counts.append(sides[:HALVES])
        self.maps.append(self._map(output.routing, len(x)))
        if self.detailed:
            self.chosen.append([self._bits(record, len(x)) for record in output.routing])
        return output

    def _bits(self, record: RoutingRecord, samples: int) -> np.ndarray | None:
        """(B, S, ceil(E / 8)) uint8, experts of each of the image's tokens."""
        if record.plan is None:
            return None
        mask = record.token_mask().view(samples, record.num_tokens, -1)
        mask = mask[: self.batch_size, record.num_context :]
        return np.packbits(mask.bool().cpu().numpy(), axis=-1)

    def _map(self, routing: list[RoutingRecord], samples: int) -> Tensor:
        """(min(B, MAPS), S) mean pairs of each of the image's tokens over the layers."""
        shown = min(self.batch_size, MAPS)
        maps = []
        for record in routing:
            if record.plan is not None:
                pairs = record.token_mask().sum(dim=1)
                maps.append(pairs.view(samples, -1)[:shown, record.num_context :])
        if not maps:
            return torch.zeros(shown, routing[0].num_tokens - routing[0].num_context)
        return torch.stack(maps).float().mean(dim=0).cpu()

    def detail(self, last: bool = False) -> Routing | None:
        """What was kept of all evaluations, or of the `last` alone; None without MoE layers."""
        if not self.counts:
            return None
        first = len(self.counts) - 1 if last else 0
        capacity = self._stacked(first).sum(dim=-1).double()  # (T, 2, L, B)
        capacity = capacity.masked_fill(capacity < 0, torch.nan)
        capacity /= torch.tensor(self.tokens, dtype=torch.float64)[:, None]
        layers = zip(*self.chosen[first:], strict=True)
        chosen = [None if layer[0] is None else np.stack(layer) for layer in layers]
        experts = self.counts[0][0].shape[-1]
        return Routing(np.array(self.times[first:]), capacity.numpy(), chosen, experts)

    def _stacked(self, first: int = 0) -> Tensor:
        """(T, 2, L, B, E) counts from evaluation `first` on, -1 where a half was not computed."""
        rows = []
        for sides in self.counts[first:]:
            absent = torch.full_like(sides[0], -1)
            rows.append(torch.stack([absent if side is None else side for side in sides]))
        return torch.stack(rows).cpu()

    def arrays(self, kept: int) -> dict[str, np.ndarray]:
        """Of the first `kept` samples.

        Returns:
            `counts` (T, 2, L, kept, E) int32, -1 where a half was not computed; `times` (T,);
            `tokens` (L,) of a sample in each layer; `maps` (T, min(B, MAPS), S) float16. Empty for
            a model without MoE layers.
        """
        if not self.counts:
            return {}
        return {
            "counts": self._stacked()[:, :, :, :kept].int().numpy(),
            "times": np.array(self.times),
            "tokens": np.array(self.tokens),
            "maps": torch.stack(self.maps)[:, :kept].half().numpy(),
        }


@dataclass
class RoutingTable:
    """Pairs of a whole set, summed over the samples of each class or prompt.

    Attributes:
        times: (T,) of the evaluations, in their order.
        pairs: (T, 2, L, E, K) int64.
        samples: (T, 2, K) int64, samples of each class or prompt that were computed.
        tokens: (L,) of a sample in each layer, those of the class included.
        maps: (T, M, S) mean pairs of each token over the layers, of the first samples of the set.
    """

    times: np.ndarray
    pairs: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray
    maps: np.ndarray

    @classmethod
    def start(cls, block: dict[str, np.ndarray], num_groups: int) -> "RoutingTable":
        """An empty table of the shape of a block's arrays; the block gives the maps."""
        evaluations, halves, layers, _, experts = block["counts"].shape
        return cls(
            block["times"],
            np.zeros((evaluations, halves, layers, experts, num_groups), np.int64),
            np.zeros((evaluations, halves, num_groups), np.int64),
            block["tokens"],
            block["maps"],
        )

    def add(self, block: dict[str, np.ndarray], labels: np.ndarray) -> None:
        """Add a block's counts (T, 2, L, B, E), of samples of the groups `labels` (B,).

        Raises:
            UserError: the block took other steps, as adaptive solvers do.
        """
        if not np.array_equal(block["times"], self.times):
            raise UserError("--capacity: blocks took different steps; use a solver of fixed steps")
        counts = block["counts"]
        there = counts[:, :, 0, :, 0] >= 0  # (T, 2, B)
        for sample, label in enumerate(labels):
            seen = there[:, :, sample]
            self.samples[:, :, label] += seen
            self.pairs[..., label] += counts[:, :, :, sample] * seen[:, :, None, None]

    def capacity(self) -> np.ndarray:
        """(T, 2, L, E, K) share of the class's tokens that each expert computed, NaN for none.

        Its sum over the experts is Eq. 8's C_infer of the layer.
        """
        tokens = self.samples[:, :, None, None] * self.tokens[:, None, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.pairs / np.where(tokens > 0, tokens, np.nan)
