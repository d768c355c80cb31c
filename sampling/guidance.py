"""Wrappers around a model while it samples: classifier-free guidance, capacity meter, a watcher."""

from collections.abc import Callable

import torch
from torch import Tensor

from config.objective import SamplingConfig
from core.conditions import Condition
from core.types import Model, ModelOutput


class InBfloat16:
    """A model whose matrix products are in bf16, by autocast; what it predicts stays float32.

    Args:
        model: what is called.
        device: where it is.
    """

    def __init__(self, model: Model, device: torch.device):
        self.model, self.device = model, device

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput:
        with torch.autocast(self.device.type, torch.bfloat16):
            output = self.model(x, t, cond)
        return ModelOutput(output.prediction.float(), output.routing)


class Guided:
    """Classifier-free guidance (Ho & Salimans 2022): u + cfg_scale (c - u).

    By default the conditional and the unconditional half go through the model in calls of their
    own, so that guidance does not change what a batch-level router does with the conditional
    half, and all channels of `x` are guided. Other channels (a learned variance) stay those of
    the conditional half.

    Args:
        model: what is called.
        null_condition: gives the unconditional side of a condition.
        settings: `cfg_scale`, `cfg_interval`, `cfg_channels`, `cfg_pooling`.
        one_call: no sample sees the others of its batch, so that both halves may share a call.
    """

    def __init__(
        self,
        model: Model,
        null_condition: Callable[[Condition], Condition],
        settings: SamplingConfig,
        one_call: bool = False,
    ):
        self.model = model
        self.one_call = one_call or settings.cfg_pooling == "joint"
        self.null_condition = null_condition
        self.settings = settings

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput:
        cond = Condition.of(cond)
        if self.settings.cfg_scale == 1 or not self._inside(t):
            return self.model(x, t, cond)
        if self.one_call:
            both = cond.cat(self.null_condition(cond))
            both = self.model(torch.cat([x, x]), torch.cat([t, t]), both)
            (c, u), routing = both.prediction.chunk(2), both.routing
        else:
            output = self.model(x, t, cond)
            free = self.model(x, t, self.null_condition(cond))
            c, u, routing = output.prediction, free.prediction, output.routing + free.routing
        C = 3 if self.settings.cfg_channels == "first3" else x.shape[1]
        guided = u[:, :C] + self.settings.cfg_scale * (c[:, :C] - u[:, :C])
        return ModelOutput(torch.cat([guided, c[:, C:]], dim=1), routing)

    def _inside(self, t: Tensor) -> bool:
        """Whether the time, the same for all samples, lies in the open guidance interval."""
        if self.settings.cfg_interval is None:
            return True
        low, high = self.settings.cfg_interval
        # Compared in the precision of t, as published: the bound 0.1 is that of a step at 0.1.
        return bool(((t[0] > low) | (low == 0)) & (t[0] < high))


class CapacityMeter:
    """Measures C_infer: pairs computed per token, averaged over layers and calls (Eq. 9, 15).

    Args:
        model: what is called, on whole batches of the samples or on both guidance halves joined.
        batch_size: samples, B.

    Attributes:
        calls: evaluations of the model for each sample (NFE); a joined call counts twice.
    """

    def __init__(self, model: Model, batch_size: int):
        self.model = model
        self.batch_size = batch_size
        self.calls = 0
        self.total: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput:
        output = self.model(x, t, cond)
        halves = len(x) // self.batch_size
        if output.routing:
            layers = [record.capacity_per_sample() for record in output.routing]
            mean = torch.stack(layers).mean(dim=0).view(halves, self.batch_size).sum(dim=0)
            self.total = mean if self.total is None else self.total + mean
        self.calls += halves
        return output

    def capacity(self) -> Tensor | None:
        """(B,) mean over the calls so far; None for a model without MoE layers."""
        return None if self.total is None else self.total / self.calls


Watch = Callable[[Tensor, Tensor, Tensor], None]
"""(x (B, C, H, W), t (B,), guided prediction (B, C_out, H, W)) of an evaluation."""


class Watched:
    """A model that tells somebody of each of its evaluations, and is not changed by it.

    Args:
        model: what is called, guidance inside.
        watch: is told; what it raises ends the sampling.
    """

    def __init__(self, model: Model, watch: Watch):
        self.model, self.watch = model, watch

    def __call__(self, x: Tensor, t: Tensor, cond: Condition) -> ModelOutput:
        output = self.model(x, t, cond)
        self.watch(x, t, output.prediction)
        return output
