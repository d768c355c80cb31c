"""What is asked of each sample of a set: a class, or a prompt."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from core.conditions import Condition
from core.rng import derive_seed
from data.dataset import TrainingData
from sampling.labels import Labels

Encode = Callable[[list[str]], list[Tensor]]
"""Texts to their rows (L_i, E)."""


class Wanted(Protocol):
    """Conditions of the samples of a set, each a function of the sample's index.

    Attributes:
        num_groups: K, classes or prompts, by which a set's records are put together.
    """

    num_groups: int

    def group(self, index: int) -> int:
        """The class or prompt of a sample, 0 ... K - 1."""
        ...

    def key(self, index: int) -> tuple[int, ...]:
        """What its noise is drawn by, besides the seed."""
        ...

    def condition(self, indices: Sequence[int]) -> Condition:
        """Of samples, on the CPU."""
        ...


class ByClass:
    """A class for each sample, and noise by its index.

    Args:
        labels: says which.
        num_classes: 0 for a model without.
    """

    def __init__(self, labels: Labels, num_classes: int):
        self.group, self.num_groups = labels, max(num_classes, 1)

    def key(self, index: int) -> tuple[int, ...]:
        """The sample's index."""
        return (index,)

    def condition(self, indices: Sequence[int]) -> Condition:
        """Labels."""
        return Condition.of_labels([self.group(index) for index in indices])


class ByPrompt:
    """Several samples of each prompt in turn, with noise by prompt and number.

    Samples beyond the last prompt, which fill the last block, begin again with the first.

    Args:
        prompts: texts.
        num_per_prompt: samples of each.
        encode: makes their rows; called for a block's prompts together, so that a sample does not
            depend on which process makes it.
        length: tokens that texts are filled up to.
    """

    def __init__(self, prompts: Sequence[str], num_per_prompt: int, encode: Encode, length: int):
        self.prompts, self.num_per_prompt = list(prompts), num_per_prompt
        self.encode, self.length, self.num_groups = encode, length, len(prompts)

    def group(self, index: int) -> int:
        """Number of the sample's prompt."""
        return index // self.num_per_prompt % self.num_groups

    def key(self, index: int) -> tuple[int, ...]:
        """Numbers of the prompt, and of the sample among those of its prompt."""
        return self.group(index), index % self.num_per_prompt

    def condition(self, indices: Sequence[int]) -> Condition:
        """Texts."""
        groups = [self.group(index) for index in indices]
        different = list(dict.fromkeys(groups))
        rows = dict(zip(different, self.encode([self.prompts[i] for i in different]), strict=True))
        return Condition.of_rows([rows[i] for i in groups], self.length)


class ByImage:
    """Captions of training images, always the same, and noise by the sample's index.

    Args:
        data: has the images.
        seed: of which images are taken.
    """

    num_groups = 1

    def __init__(self, data: TrainingData, seed: int):
        self.data, self.seed = data, seed

    def group(self, index: int) -> int:
        """All are of one kind."""
        return 0

    def key(self, index: int) -> tuple[int, ...]:
        """The sample's index."""
        return (index,)

    def condition(self, indices: Sequence[int]) -> Condition:
        """First captions of images."""
        images = [derive_seed(self.seed, "shown", i) % len(self.data) for i in indices]
        return self.data.conditions.shown(images, self.data.source.labels(images))
