"""Which class each sample of a set gets."""

from collections.abc import Callable

import torch

from core.rng import generator

Labels = Callable[[int], int]
"""Index of a sample -> its class."""


def random_labels(num_classes: int, seed: int, num_samples: int | None = None) -> Labels:
    """Uniform, a function of (seed, index) alone; 0 for a model without classes."""

    def label(index: int) -> int:
        if num_classes == 0:
            return 0
        draw = generator(seed, "sample label", index)
        return int(torch.randint(num_classes, (), generator=draw))

    return label


def balanced_labels(num_classes: int, seed: int, num_samples: int) -> Labels:
    """Every class equally often, give or take one, in an order shuffled by the seed.

    Shuffled, since scores by parts of a set, as the inception score is, suffer from sorted ones.
    Indices beyond the set, which fill its last block, get uniform classes.
    """
    order = torch.randperm(num_samples, generator=generator(seed, "label order"))
    order %= max(num_classes, 1)
    beyond = random_labels(num_classes, seed)
    return lambda index: int(order[index]) if index < num_samples else beyond(index)


def chosen_labels(classes: list[int], per_class: int) -> Labels:
    """`per_class` samples of each of `classes` in turn, and over again beyond them."""
    return lambda index: classes[index // per_class % len(classes)]


LABELS = {"random": random_labels, "balanced": balanced_labels}
"""Label schemes by name: (num_classes, seed, num_samples) -> Labels."""
