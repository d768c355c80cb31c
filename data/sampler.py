"""The order of the training samples: a function of (seed, step), whoever asks."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from core.errors import UserError
from core.rng import generator


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one process as lists of (epoch, index).

    Each epoch is a fresh permutation; what does not fill a global batch at its end is left out.
    The micro-batches of an optimizer step are numbered over all processes, and process r of W
    takes numbers r, r + W, ...: the samples of a step, and their division into token pools, are
    the same for any number of processes.

    Args:
        num_samples: size of the data set.
        global_batch_size: samples per optimizer step.
        micro_batch_size: samples per forward pass; a multiple of it, times `world_size`, is the
            global batch.
        rank, world_size: of this process.
        seed: of the permutations.
        steps: optimizer steps to serve; starting above 0 resumes.

    Raises:
        UserError: when the data set is smaller than one global batch.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        steps: range,
    ):
        if num_samples < global_batch_size:
            raise UserError(
                f"train.global_batch_size: {global_batch_size} is more than the {num_samples} "
                f"training images; at most {num_samples} is allowed"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.steps = steps

    def __len__(self) -> int:
        per_step = self.global_batch_size // (self.micro_batch_size * self.world_size)
        return len(self.steps) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_samples // self.global_batch_size
        epoch, order = -1, torch.empty(0)
        for step in self.steps:
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                shuffle = generator(self.seed, "order", epoch)
                order = torch.randperm(self.num_samples, generator=shuffle)
            first = step % steps_per_epoch * self.global_batch_size
            batch = order[first : first + self.global_batch_size]
            for micro in batch.split(self.micro_batch_size)[self.rank :: self.world_size]:
                yield [(epoch, index) for index in micro.tolist()]
