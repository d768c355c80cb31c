"""What training draws from: latents sampled anew from their posteriors in every epoch, or images.

An item is requested as a pair (epoch, index). Which view of the image it takes, as it is or
mirrored, and its posterior noise are functions of (seed, epoch, index) alone.

Shapes: B batch, C latent channels, h and w height and width of the latent.
"""

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from core.conditions import Condition
from core.rng import derive_seed, generator
from data.conditions import Conditions, Drawn, Items
from data.latents import Moments
from data.online import Images

Batch = tuple[Tensor, Condition]
"""Latents (B, C, h, w) float32 as the model sees them, and conditions of B samples."""


class TrainingData(Protocol):
    """A data set whose batches are fetched by loader processes and finished by the training one."""

    source: Moments | Images
    conditions: Conditions

    def __len__(self) -> int: ...

    def __getitems__(self, items: Items) -> object:
        """What loader processes make of a batch: PyTorch's batched fetch, to collate as it is."""
        ...

    def fetched_bytes(self) -> int:
        """Of one sample, as loader processes hand it over."""
        ...

    def finish(self, fetched: object) -> Batch:
        """The batch, on any device, of what was fetched."""
        ...


class _Drawing(Dataset):
    """What all data sets here know.

    Args:
        source: where the moments or images are.
        seed: of the draws.
        horizontal_flip: take the mirror image with probability one half.
        conditions: what the samples are conditioned on; by default their labels.
    """

    def __init__(
        self,
        source: Moments | Images,
        seed: int,
        horizontal_flip: bool = True,
        conditions: Conditions | None = None,
    ):
        self.source, self.seed, self.horizontal_flip = source, seed, horizontal_flip
        self.conditions = conditions or Conditions(seed)

    def __len__(self) -> int:
        return len(self.source)


class LatentDataset(_Drawing):
    """Draws from stored moments."""

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Condition | Drawn]:
        """One latent (C, h, w), and what its condition is made of."""
        latents, cond = self.__getitems__([item])
        return latents[0], cond

    def __getitems__(self, items: Items) -> tuple[Tensor, Condition | Drawn]:
        """Latents (B, C, h, w) and what their conditions are made of."""
        indices = [index for _, index in items]
        views = [int(self.horizontal_flip and is_mirrored(self.seed, *item)) for item in items]
        noise = posterior_noise(self.seed, items, self.source.latent_shape)
        cond = self.conditions.fetch(items, self.source.labels(indices))
        moments = self.source.moments(indices, views)
        return draw(moments, noise, self.source), cond

    def fetched_bytes(self) -> int:
        """Of a latent in float32, and its condition."""
        return 4 * math.prod(self.source.latent_shape) + self.conditions.fetched_bytes()

    def finish(self, fetched: tuple[Tensor, Condition | Drawn]) -> Batch:
        """Latents and conditions."""
        latents, cond = fetched
        return latents, self.conditions.finish(cond)


class ImageDataset(_Drawing):
    """Images themselves, for models in pixel space; loader processes read them."""

    def __getitems__(self, items: Items) -> tuple:
        """Images (B, 3, H, W) uint8, each in its view, and what their conditions are made of."""
        images = self.source.images([index for _, index in items])
        if self.horizontal_flip:
            mirrored = torch.tensor([is_mirrored(self.seed, *item) for item in items])
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        labels = self.source.labels([index for _, index in items])
        return images, self.conditions.fetch(items, labels)

    def fetched_bytes(self) -> int:
        """Of an image, and its condition."""
        return 3 * self.source.image_size**2 + self.conditions.fetched_bytes()

    def finish(self, fetched: tuple) -> Batch:
        """Images (B, 3, H, W) in [-1, 1], on the device, and conditions."""
        images, cond = fetched
        return self.source.floats(images), self.conditions.finish(cond)


class EncodedDataset(ImageDataset):
    """Draws from images that the training process encodes.

    The draws are those of `LatentDataset` for a cache of the same images.
    """

    def __getitems__(self, items: Items) -> tuple:
        """What `ImageDataset` fetches, and posterior noise."""
        noise = posterior_noise(self.seed, items, self.source.latent_shape)
        return *super().__getitems__(items), noise

    def fetched_bytes(self) -> int:
        """Of an image, its latent's noise, and its condition."""
        return super().fetched_bytes() + 4 * math.prod(self.source.latent_shape)

    def finish(self, fetched: tuple) -> Batch:
        """Latents of the images, on the VAE's device, and conditions."""
        images, cond, noise = fetched
        moments = self.source.encode(images)
        latents = draw(moments, noise.to(moments.device), self.source)
        return latents, self.conditions.finish(cond)


def is_mirrored(seed: int, epoch: int, index: int) -> bool:
    """True for one half of all (epoch, index)."""
    return bool(derive_seed(seed, "mirror", epoch, index) & 1)


def posterior_noise(seed: int, items: Items, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise (B, *shape), a row for each (epoch, index)."""
    # numpy's memory, since this becomes the batch: what torch allocates in a loader process and its
    # sending thread frees leaves gaps, half a gigabyte of them before they are used again.
    noise = torch.from_numpy(np.empty((len(items), *shape), dtype=np.float32))
    for row, item in zip(noise, items, strict=True):
        row.normal_(generator=generator(seed, "posterior", *item))
    return noise


def draw(moments: Tensor, noise: Tensor, source: Moments | Images) -> Tensor:
    """Latents (B, C, h, w) float32, shifted and scaled, from moments (B, 2C, h, w).

    In place, in the memory of `noise`: fresh memory for every intermediate result takes six times
    as long.
    """
    mean, logvar = moments.chunk(2, dim=1)
    noise.mul_(logvar.float().mul_(0.5).exp_()).add_(mean)
    return noise.sub_(source.shift_factor).mul_(source.scaling_factor)
