"""Quadrants of scenes with a known digit or nothing, clean and as generative models may make them.

Shapes: N crops, S = 16 their side.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.compositions import DIGITS, Draw, arrange, scene
from data.scenes import SIZE, paint, scans_of
from evaluations.digit_classifier import augment

SIDE = SIZE // 2
QUADRANTS = [(row, column) for row in (0, 1) for column in (0, 1)]
NOTHING = len(DIGITS)
"""Label of a crop without a digit."""


@dataclass(frozen=True)
class Crops:
    """Images (N, S, S, 3) uint8, labels (N,) int64, and the colour of each, "" without a digit."""

    images: np.ndarray
    labels: np.ndarray
    colors: list[str]


def quadrants(images: np.ndarray) -> np.ndarray:
    """The quadrants (4N, S, S, 3) of scenes (N, 2S, 2S, 3), in the order of QUADRANTS."""
    split = images.reshape(-1, 2, SIDE, 2, SIDE, 3).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(split).reshape(-1, SIDE, SIDE, 3)


def draw_crops(count: int, val: bool, seed: int) -> Crops:
    """The quadrants of `count` scenes, painted with training scans or with held-out ones."""
    scans, purpose = scans_of(val), f"finder {'val' if val else 'train'}"
    images, found = [], []
    for index in range(count):
        draw = Draw(seed, f"picture {purpose}", index)
        placed = arrange(scene(seed, purpose, index, seen_only=False), draw, seen_only=False)
        images.append(np.asarray(paint(placed, scans, draw)))
        there = {one.quadrant: one for one in placed}
        found += [there.get(place) for place in QUADRANTS]
    labels = [NOTHING if one is None else DIGITS.index(one.digit) for one in found]
    colors = ["" if one is None else one.color for one in found]
    return Crops(quadrants(np.stack(images)), np.array(labels, np.int64), colors)


def ink(images: Tensor) -> Tensor:
    """Brightness (N, 1, S, S) in [0, 1] of crops (N, S, S, 3) uint8: that of any colour."""
    return images.amax(dim=-1)[:, None].float() / 255


def spoil(x: Tensor, labels: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ink and labels of crops as generative models may make them.

    Digits are turned, resized and shifted a little (`digit_classifier.augment`), blurred, faint,
    with a ghost of another crop, on a ground that is not black. Some become what is no digit:
    halves between two, pieces at the edge, blots.

    Args:
        x: (N, 1, S, S) in [0, 1].
        labels: (N,).
        draw: makes the choices.
    """
    n = len(x)

    def chance(share: float) -> Tensor:
        return torch.rand(n, generator=draw) < share

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=draw)

    x, labels = augment(x, draw), labels.clone()
    other = torch.randperm(n, generator=draw)
    two = (labels != NOTHING) & (labels[other] != NOTHING) & (labels != labels[other])
    even = chance(0.12) & two
    ghost = between(0.0, 0.3) * chance(0.3)[:, None, None, None]
    mixed = torch.maximum(x, ghost * x[other])
    x = torch.where(even[:, None, None, None], (x + x[other]) * between(0.5, 0.7), mixed)
    piece = chance(0.05)
    x = torch.where(piece[:, None, None, None], _pieces(x, draw), x)
    blot = chance(0.08)
    x = torch.where(blot[:, None, None, None], _blots(n, draw), x)
    labels[even | piece | blot] = NOTHING
    x = torch.lerp(x, _blur(x), between(0.0, 1.0) * chance(0.5)[:, None, None, None])
    x = x * between(0.5, 1.05) + between(0.0, 0.15) * chance(0.3)[:, None, None, None]
    x = x + between(0.0, 0.08) * torch.randn(x.shape, generator=draw).abs()
    return x.clamp(0, 1), labels


def _pieces(x: Tensor, draw: torch.Generator) -> Tensor:
    """What remains of crops at an edge when they are moved by 7 to 10 pixels."""
    far = int(torch.randint(7, 11, (1,), generator=draw))
    step = [(far, 0), (-far, 0), (0, far), (0, -far)][int(torch.randint(4, (1,), generator=draw))]
    padded = F.pad(x, (far, far, far, far))
    top, left = far + step[0], far + step[1]
    return padded[:, :, top : top + SIDE, left : left + SIDE]


def _blots(n: int, draw: torch.Generator) -> Tensor:
    """Smooth noise of several sizes, from a wash to grains."""
    side = (2, 4, 8, 16)[int(torch.randint(4, (1,), generator=draw))]
    noise = torch.rand(n, 1, side, side, generator=draw)
    contrast = 1 + 4 * torch.rand(n, 1, 1, 1, generator=draw)
    x = F.interpolate(noise, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return ((x - 0.5) * contrast + 0.5 * torch.rand(n, 1, 1, 1, generator=draw)).clamp(0, 1)


def _blur(x: Tensor) -> Tensor:
    """Under a Gaussian of one pixel."""
    line = torch.tensor([0.0545, 0.2442, 0.4026, 0.2442, 0.0545])
    return F.conv2d(x, (line[:, None] * line)[None, None], padding=2)
