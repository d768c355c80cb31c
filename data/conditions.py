"""What training samples are conditioned on: labels, and a caption's text in each epoch.

Which caption of an image an epoch takes is a function of (seed, epoch, index) alone.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from core.conditions import Condition
from core.errors import UserError
from core.rng import derive_seed
from data.text.facts import TextFacts

Items = Sequence[tuple[int, int]]
"""Pairs (epoch, index)."""

Choice = tuple[int, int]
"""Number of a caption, and of the source that it is from."""


class Captions(Protocol):
    """Captions of numbered images, and the rows that an encoder makes of them.

    Attributes:
        path: where they are, for messages.
        facts: of the encoder.
        sources: names of what the captions come from.
        null: (L0, E), the encoder's output for the empty caption.
    """

    path: str
    facts: TextFacts
    sources: list[str]
    null: Tensor

    def choices(self, image: int) -> list[Choice]:
        """The captions of an image."""
        ...

    def rows(self, captions: Sequence[int]) -> list[Tensor]:
        """(L_i, E) of each caption."""
        ...

    def first_without(self, sources: Collection[str]) -> int | None:
        """The first image that has no caption of these sources; None if all have."""
        ...


@dataclass(frozen=True)
class Drawn:
    """Numbers of captions, for the process that encodes them, and labels (B,)."""

    captions: list[int]
    labels: Tensor | None


class Conditions:
    """Makes the conditions of a batch.

    Args:
        seed: of the choice of captions.
        labels: hand out labels, for a model that takes them.
        captions: for a model of text.
        choice: `random`, `first`, or weights of the captions' sources.
        length: tokens that texts are filled up to.
        encoding: rows are made where the model is, not in loader processes.

    Raises:
        UserError: a weight of a source that the captions do not have, or an image all of whose
            captions have none.
    """

    def __init__(
        self,
        seed: int,
        labels: bool = True,
        captions: Captions | None = None,
        choice: str | dict[str, float] = "random",
        length: int = 0,
        encoding: bool = False,
    ):
        self.seed, self.labels, self.captions = seed, labels, captions
        self.choice, self.length, self.encoding = choice, length, encoding
        if isinstance(choice, dict) and captions is not None:
            _check_weights(choice, captions)

    @property
    def null(self) -> Tensor | None:
        """(L0, E), the rows of the empty caption; None without text."""
        return None if self.captions is None else self.captions.null

    def text_facts(self) -> dict | None:
        """Of the encoder, for checkpoints; None without text."""
        return None if self.captions is None else asdict(self.captions.facts)

    def fetch(self, items: Items, labels: Tensor) -> Condition | Drawn:
        """What loader processes make of items whose images have `labels` (B,)."""
        if self.captions is None:
            return Condition(labels if self.labels else labels * 0)
        drawn = Drawn([self._caption(*item) for item in items], labels if self.labels else None)
        return drawn if self.encoding else self._of(drawn)

    def fetched_bytes(self) -> int:
        """Of one sample's condition, as loader processes hand it over."""
        if self.captions is None or self.encoding:
            return 8
        return self.length * (self.null.shape[1] * self.null.element_size() + 1) + 8

    def finish(self, fetched: Condition | Drawn) -> Condition:
        """The conditions of what was fetched."""
        return self._of(fetched) if isinstance(fetched, Drawn) else fetched

    def shown(self, indices: Sequence[int], labels: Tensor) -> Condition:
        """Conditions of some images, always the same."""
        first = copy.copy(self)
        first.choice = "first"
        return first.finish(first.fetch([(0, index) for index in indices], labels))

    def _of(self, drawn: Drawn) -> Condition:
        return Condition.of_rows(self.captions.rows(drawn.captions), self.length, drawn.labels)

    def _caption(self, epoch: int, index: int) -> int:
        choices = self.captions.choices(index)
        if self.choice == "first":
            return choices[0][0]
        draw = derive_seed(self.seed, "caption", epoch, index) / 2**63
        if self.choice != "random":
            choices, draw = self._of_source(choices, draw)
        return choices[int(draw * len(choices))][0]

    def _of_source(self, choices: list[Choice], draw: float) -> tuple[list[Choice], float]:
        """The captions of a source chosen by weight, and what the draw says within them."""
        names = self.captions.sources
        there = {source for _, source in choices}
        weights = {s: self.choice.get(names[s], 0.0) for s in sorted(there)}
        place, first = draw * sum(weights.values()), 0.0
        for source, weight in weights.items():
            if weight > 0 and place < first + weight:
                within = (place - first) / weight
                return [one for one in choices if one[1] == source], within
            first += weight
        raise AssertionError("a draw below 1 falls into one of the weights")


def _check_weights(weights: dict[str, float], captions: Captions) -> None:
    """See, before training comes to it, that every image has a caption with a weight above 0."""
    for name in weights:
        if name not in captions.sources:
            raise UserError(
                f"data.caption_choice: {captions.path} has no captions of source {name!r}; it has "
                f"{', '.join(captions.sources)}"
            )
    image = captions.first_without([name for name, weight in weights.items() if weight > 0])
    if image is not None:
        there = dict.fromkeys(captions.sources[source] for _, source in captions.choices(image))
        raise UserError(
            f"data.caption_choice: image {image} of {captions.path} has captions of "
            f"{', '.join(there)} alone, none with a weight above 0"
        )
