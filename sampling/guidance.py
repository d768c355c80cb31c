"""Wrappers around a model while it samples: classifier-free guidance, capacity meter."""

from collections.abc import Callable

import torch
from torch import Tensor

from core.types import Model, ModelOutput
from models.dit import DiT


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022): u + cfg_scale (c - u).

    Conditional and unconditional halves go through the model in calls of their own, so that
    guidance does not change what a batch-level router does with the conditional half. Channels
    beyond those of `x` (a learned variance) stay those of the conditional call.

    Args:
        model: what is called.
        null_condition: gives the unconditional side of a condition.
        cfg_scale: 1 leaves the unconditional call out.
    """

    def __init__(self, model: Model, null_condition: Callable[[Tensor], Tensor], cfg_scale: float):
        self.model = model
        self.null_condition = null_condition
        self.cfg_scale = cfg_scale

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        output = self.model(x, t, cond)
        if self.cfg_scale == 1:
            return output
        free = self.model(x, t, self.null_condition(cond))
        C = x.shape[1]
        c, u = output.prediction[:, :C], free.prediction[:, :C]
        guided = torch.cat([u + self.cfg_scale * (c - u), output.prediction[:, C:]], dim=1)
        return ModelOutput(guided, output.routing + free.routing)


class CapacityMeter:
    """Measures C_infer: pairs computed per token, averaged over layers and calls (Eq. 9, 15)."""

    def __init__(self, model: DiT):
        self.model = model
        self.calls = 0
        self.total: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        output = self.model(x, t, cond)
        if output.routing:
            layers = [record.capacity_per_sample() for record in output.routing]
            mean = torch.stack(layers).mean(dim=0)
            self.total = mean if self.total is None else self.total + mean
        self.calls += 1
        return output

    def capacity(self) -> Tensor | None:
        """(B,) mean over the calls so far; None for a model without MoE layers."""
        return None if self.total is None else self.total / self.calls
