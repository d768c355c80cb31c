"""The loss on held-out latents by noise level, always at the same images, times and noise."""

from contextlib import nullcontext

import torch
from torch import Tensor

from config.schema import Config
from core.distributed import Processes
from core.logging import progress
from core.rng import generator
from core.types import Objective
from data.sources import validation_data
from data.text.facts import TextFacts
from models.dit import DiT
from training.interruption import StopRequest

BINS = 10
"""Noise levels from 0 (data) to 1 (noise) are counted in so many equal bins."""


class Validation:
    """Evaluates a model on the first images of a cache.

    Image i of N gets the time at (i + 1/2) / N of the training distribution, in an order shuffled
    once, so that every forward pass has all noise levels. The unit of work is a block of
    `micro_batch_size` images: routing over the batch does not depend on the number of processes.

    Args:
        config: names the cache, the number of images and the block.
        objective: the loss.
        processes: share the blocks.
        texts: of the encoder of the captions trained on, for a model of text.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        processes: Processes,
        texts: TextFacts | None = None,
    ):
        self.data = validation_data(config, processes, texts)
        self.objective, self.processes = objective, processes
        self.count = min(config.train.num_val_samples, len(self.data))
        self.block = config.train.micro_batch_size
        self.seed = config.seed
        order = generator(config.seed, "validation order")
        self.times = (torch.randperm(self.count, generator=order) + 0.5) / self.count
        # Spread over the cache, which may be sorted by class.
        self.indices = torch.linspace(0, len(self.data) - 1, self.count).long().tolist()

    @torch.no_grad()
    def losses(
        self, model: DiT, sharded: bool = False, stop: StopRequest | None = None
    ) -> Tensor | None:
        """(BINS,) mean loss by noise level, NaN where no image falls, on every process.

        Args:
            model: in evaluation mode.
            sharded: the processes can only compute together, so each does all blocks.
            stop: on which the work is broken off; the result is None then.
        """
        device = self.processes.device
        sums = torch.zeros(2, BINS, dtype=torch.float64)
        blocks = range(0, self.count, self.block)
        mine = blocks if sharded else blocks[self.processes.rank :: self.processes.world_size]
        with nullcontext() if stop is None else stop.interrupting(model, sharded):
            for first in progress(mine, self.processes, "validation", "block", leave=False):
                self._add(sums, model, first)
        if stop is not None and stop.ask_all():
            return None
        if not sharded:
            sums = self.processes.all_reduce_sum(sums.to(device)).cpu()
        return sums[0] / sums[1]

    def _add(self, sums: Tensor, model: DiT, first: int) -> None:
        """Add the block that begins at image `first` to sums (2, BINS) of losses and images."""
        places = range(first, min(first + self.block, self.count))
        items = [(0, self.indices[i]) for i in places]
        x, cond = self.data.finish(self.data.__getitems__(items))
        draws = [generator(self.seed, "validation noise", i) for i in places]
        noise = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in draws])
        t = self.objective.time_of(self.times[first : places[-1] + 1])
        moved = (v.to(self.processes.device) for v in (x, cond, t, noise))
        terms = self.objective.losses_at(model, *moved)
        level = (terms.noise_level.double() * BINS).long().clamp(0, BINS - 1).cpu()
        sums[0].index_add_(0, level, terms.per_sample.double().cpu())
        sums[1].index_add_(0, level, torch.ones(len(x), dtype=torch.float64))
