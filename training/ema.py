"""The exponential moving average of the weights."""

import copy

import torch
from torch import nn


class EMA:
    """A second model whose parameters are averages over the training steps.

    Buffers (thresholds) are taken over as they are: averaged with a decay of 0.9999 they would
    stay near zero for tens of thousands of steps, and every expert would take every token.

    Args:
        model: averaged; the average starts as its copy.
        decay: weight of the old average in one step.
        warmup: begin with a shorter average, decay min(decay, (1 + step) / (10 + step)).
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.warmup = warmup

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards `model` after optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        averages, live = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(averages, live, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
