"""Cached texts of several folders of images as one, and what fits to what."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate

from torch import Tensor

from core.errors import UserError
from data.conditions import Captions, Choice
from data.latents import Moments
from data.online import Images
from data.text.cache import TextCache


def as_list(paths: str | list[str]) -> list[str]:
    """One path or several, as several."""
    return [paths] if isinstance(paths, str) else paths


def joined(texts: Sequence[TextCache], parts: Sequence[Moments | Images]) -> Captions:
    """The texts of the images of `parts`, one after the other.

    Raises:
        UserError: their number differs, or the images, or the encoders.
    """
    if len(texts) != len(parts):
        raise UserError(
            f"data.text_cached_path: names {len(texts)} folder(s), but there are {len(parts)} of "
            "images; each needs its own"
        )
    for text, part in zip(texts, parts, strict=True):
        text.check_images(part)
    return texts[0] if len(texts) == 1 else JoinedTexts(texts)


class JoinedTexts:
    """Several caches of texts, made by the same encoder, as one.

    Captions are numbered through all of them.

    Raises:
        UserError: made by different encoders.
    """

    def __init__(self, parts: Sequence[TextCache]):
        first, *others = parts
        for other in others:
            difference = first.facts.difference(other.facts)
            if difference is not None:
                raise UserError(
                    f"data.text_cached_path: {first.path} and {other.path} cannot be joined: "
                    f"{difference}"
                )
        self.parts, self.path = list(parts), ", ".join(part.path for part in parts)
        self.facts, self.null = first.facts, first.null
        self.sources = list(dict.fromkeys(name for part in parts for name in part.sources))
        self._images = list(accumulate((len(part) for part in parts), initial=0))
        self._captions = list(accumulate((part.captions for part in parts), initial=0))

    def __len__(self) -> int:
        return self._images[-1]

    def choices(self, image: int) -> list[Choice]:
        """The captions of an image."""
        number = bisect_right(self._images, image) - 1
        part, first = self.parts[number], self._captions[number]
        return [
            (first + caption, self.sources.index(part.sources[source]))
            for caption, source in part.choices(image - self._images[number])
        ]

    def first_without(self, sources: Collection[str]) -> int | None:
        """The first image that has no caption of these sources; None if all have."""
        for first, part in zip(self._images, self.parts, strict=False):
            image = part.first_without([name for name in sources if name in part.sources])
            if image is not None:
                return first + image
        return None

    def rows(self, captions: Sequence[int]) -> list[Tensor]:
        """(L_i, E) of each caption."""
        found = []
        for caption in captions:
            number = bisect_right(self._captions, caption) - 1
            found += self.parts[number].rows([caption - self._captions[number]])
        return found
