"""The order of the training samples: a function of (seed, step), whoever asks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from core.errors import UserError
from core.rng import generator


@dataclass(frozen=True)
class Position:
    """Where training stands in its data, whatever the batch was so far.

    What does not fill a batch at the end of an epoch is left out.

    Attributes:
        epoch: number of the epoch.
        taken: samples of its order that were used or left out.
    """

    epoch: int = 0
    taken: int = 0

    def of_batch(self, size: int, num_samples: int) -> "Position":
        """Where the next batch of `size` samples begins, in epochs of `num_samples`."""
        fits = self.taken + size <= num_samples
        return self if fits else Position(self.epoch + 1)

    def after_batch(self, size: int, num_samples: int) -> "Position":
        """Where training stands when that batch was taken."""
        begin = self.of_batch(size, num_samples)
        return Position(begin.epoch, begin.taken + size)

    @classmethod
    def after_steps(cls, steps: int, size: int, num_samples: int) -> "Position":
        """Where training stands after so many batches of one size."""
        epoch, step = divmod(steps, num_samples // size)
        return cls(epoch, step * size)


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
        rank: of this process.
        world_size: processes that share a batch.
        position: where the first batch is sought.
        steps: how many optimizer steps to serve.

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
        position: Position,
        steps: int,
    ):
        check_enough(len(order), global_batch_size)
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.position = position
        self.steps = steps

    def __len__(self) -> int:
        per_step = self.global_batch_size // (self.micro_batch_size * self.world_size)
        return self.steps * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, position = self.global_batch_size, self.position
        epoch, samples = -1, torch.empty(0)
        for _ in range(self.steps):
            begin = position.of_batch(size, len(self.order))
            if begin.epoch != epoch:
                epoch = begin.epoch
                samples = self.order.epoch(epoch)
            batch = samples[begin.taken : begin.taken + size]
            for micro in batch.split(self.micro_batch_size)[self.rank :: self.world_size]:
                yield [(epoch, index) for index in micro.tolist()]
            position = position.after_batch(size, len(self.order))
