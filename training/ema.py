"""The exponential moving average of the weights."""

import torch
from torch import Tensor, nn

from training.parallel import local


class EMA:
    """A second model whose parameters are averages over the training steps.

    Buffers (thresholds) are taken over as they are: averaged with a decay of 0.9999 they would
    stay near zero for tens of thousands of steps, and every expert would take every token.

    Args:
        model: a copy of the model that is trained, which becomes the average.
        decay: weight of the old average in one step.
        warmup: begin with a shorter average, decay min(decay, (1 + step) / (10 + step)).
        every: steps between updates, which then have the decay to that power.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool, every: int = 1):
        self.model = model.eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup
        self.every = every

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor | None = None) -> None:
        """Move towards `model` after optimizer step number `step` (from 0).

        Between updates nothing is kept, so that a resume has nothing to know of them.

        Args:
            model: with the parameters after the step.
            step: number of the step.
            finite: scalar on the device, 0 for a step that was skipped; None for 1.
        """
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
        if (step + 1) % self.every:
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages, live = (local(m.parameters()) for m in (self.model, model))
        taken = averages[0].new_ones(()) if finite is None else finite
        weight = taken * (1 - decay**self.every)
        for average, now in zip(averages, live, strict=True):
            average.lerp_(now, weight)  # one pass over both, on the device's own word
