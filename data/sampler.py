"""The order of the training samples: a function of (seed, step), whoever asks."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from core.errors import UserError
from core.rng import generator


class Shuffled:
    """Permutations of the whole data set, one for each epoch.

    Args:
        num_samples: size of the data set.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, seed: int):
        self.num_samples, self.seed = num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def epoch(self, number: int) -> Tensor:
        """(N,) int64: the samples in their order in an epoch, a function of (seed, epoch)."""
        shuffle = generator(self.seed, "order", number)
        return torch.randperm(self.num_samples, generator=shuffle)


class ShuffledShards:
    """Shards in random order, and the samples of `window` consecutive ones mixed.

    Only the window's files are read at a time, from one end to the other of the epoch.

    Args:
        shards: (first, last + 1) of the samples of each.
        window: shards that are mixed.
        seed: of the permutations.
    """

    def __init__(self, shards: Sequence[tuple[int, int]], window: int, seed: int):
        self.shards, self.window, self.seed = list(shards), window, seed

    def __len__(self) -> int:
        return sum(last - first for first, last in self.shards)

    def epoch(self, number: int) -> Tensor:
        """(N,) int64: the samples in their order in an epoch, a function of (seed, epoch)."""
        shuffle = generator(self.seed, "order of shards", number)
        order = torch.randperm(len(self.shards), generator=shuffle)
        parts = []
        for window in order.split(self.window):
            samples = torch.cat([torch.arange(*self.shards[i]) for i in window.tolist()])
            parts.append(samples[torch.randperm(len(samples), generator=shuffle)])
        return torch.cat(parts)


def check_enough(images: int, global_batch_size: int) -> None:
    """Refuse a data set that is smaller than one global batch.

    Raises:
        UserError: it is.
    """
    if images < global_batch_size:
        raise UserError(
            f"train.global_batch_size: {global_batch_size} is more than the {images} "
            f"training images; at most {images} is allowed"
        )


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of one process as lists of (epoch, index).

    What does not fill a global batch at its end is left out.
    The micro-batches of an optimizer step are numbered over all processes, and process r of W
    takes numbers r, r + W, ...: the samples of a step, and their division into token pools, are
    the same for any number of processes.

    Args:
        order: of the samples in each epoch.
        global_batch_size: samples per optimizer step.
        micro_batch_size: samples per forward pass; a multiple of it, times `world_size`, is the
            global batch.
        rank, world_size: of this process.
        steps: optimizer steps to serve; starting above 0 resumes.

    Raises:
        UserError: when the data set is smaller than one global batch.
    """

    def __init__(
        self,
        order: Shuffled | ShuffledShards,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        steps: range,
    ):
        check_enough(len(order), global_batch_size)
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.steps = steps

    def __len__(self) -> int:
        per_step = self.global_batch_size // (self.micro_batch_size * self.world_size)
        return len(self.steps) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = len(self.order) // self.global_batch_size
        epoch, samples = -1, torch.empty(0)
        for step in self.steps:
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                samples = self.order.epoch(epoch)
            first = step % steps_per_epoch * self.global_batch_size
            batch = samples[first : first + self.global_batch_size]
            for micro in batch.split(self.micro_batch_size)[self.rank :: self.world_size]:
                yield [(epoch, index) for index in micro.tolist()]
