"""What a model is conditioned on: class labels, the text of captions, or both.

Shapes: B samples, L tokens of a text, E width of the text encoder.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Conditions of B samples; whoever passes them on need not know of which kind they are.

    Attributes:
        labels: (B,) int64 classes, or None.
        text: (B, L, E) a text encoder's output, or None.
        mask: (B, L) bool, which tokens of the text are there; at least one in every row.
        free: (B,) bool, samples on the unconditional side: dropped in training; null, or a
            negative prompt's, in sampling. None for none of them.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    free: Tensor | None = None

    @classmethod
    def of(cls, cond: "Condition | Tensor") -> "Condition":
        """A condition as it is; labels (B,) by themselves as one."""
        return cls(cond) if isinstance(cond, Tensor) else cond

    @classmethod
    def of_labels(cls, labels: Sequence[int]) -> "Condition":
        """Of classes."""
        return cls(torch.tensor(labels, dtype=torch.int64))

    @classmethod
    def of_rows(
        cls, rows: Sequence[Tensor], length: int, labels: Tensor | None = None
    ) -> "Condition":
        """Of texts, on the CPU.

        Args:
            rows: (L_i, E) tokens of each text.
            length: L that they are filled up to, so that shapes stay the same.
            labels: (B,) classes besides.

        Raises:
            ValueError: a text without a token, which nothing can attend to, or one that is longer.
        """
        sizes = [len(row) for row in rows]
        if min(sizes) < 1 or max(sizes) > length:
            wrong = next(size for size in sizes if not 1 <= size <= length)
            raise ValueError(f"text: {wrong} tokens; allowed: 1 ... {length}")
        shape, kind = (len(rows), length, rows[0].shape[1]), rows[0].dtype
        # numpy's memory, since loader processes make this: see `data.dataset.posterior_noise`.
        memory = np.zeros(math.prod(shape) * kind.itemsize, np.uint8)
        text = torch.from_numpy(memory).view(kind).view(shape)
        for place, row in zip(text, rows, strict=True):
            place[: len(row)] = row
        mask = torch.arange(length) < torch.tensor(sizes)[:, None]
        return cls(labels, text, mask)

    def __len__(self) -> int:
        return len(self.text if self.labels is None else self.labels)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return (self.text if self.labels is None else self.labels).device

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        parts = (getattr(self, field.name) for field in fields(self))
        return Condition(*(None if part is None else change(part) for part in parts))

    def to(self, *args: Any, **kwargs: Any) -> "Condition":
        """On another device, with the arguments of `Tensor.to`."""
        return self._each(lambda part: part.to(*args, **kwargs))

    def pin_memory(self) -> "Condition":
        """In memory that a GPU reads directly; what a loader asks for."""
        return self._each(Tensor.pin_memory)

    def rows(self, index: slice | Tensor) -> "Condition":
        """Of some of the samples."""
        return self._each(lambda part: part[index])

    def side(self, free: bool) -> "Condition":
        """The same conditions, all of them on the unconditional side, or none."""
        flags = torch.full((len(self),), free, device=self.device)
        return Condition(self.labels, self.text, self.mask, flags)

    def cat(self, other: "Condition") -> "Condition":
        """This one's samples, then the other's."""
        return self._with(other, lambda a, b: torch.cat([a, b]))

    def where(self, chosen: Tensor, other: "Condition") -> "Condition":
        """This one's rows where `chosen` (B,) is true, elsewhere the other's."""

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *[1] * (mine.dim() - 1)), mine, theirs)

        return self._with(other, pick)

    def _with(self, other: "Condition", join: Callable[[Tensor, Tensor], Tensor]) -> "Condition":
        """Part by part, of two conditions of the same kind; the shorter texts are filled up."""
        one, two = self._marked(), other._marked()
        if self.text is not None:
            length = max(self.text.shape[1], other.text.shape[1])
            one, two = one._filled(length), two._filled(length)
        parts = []
        for field in fields(self):
            mine, theirs = getattr(one, field.name), getattr(two, field.name)
            parts.append(None if mine is None else join(mine, theirs))
        return Condition(*parts)

    def _marked(self) -> "Condition":
        return self if self.free is not None else self.side(False)

    def _filled(self, length: int) -> "Condition":
        more = length - self.text.shape[1]
        text, mask = F.pad(self.text, (0, 0, 0, more)), F.pad(self.mask, (0, more))
        return Condition(self.labels, text, mask, self.free)
