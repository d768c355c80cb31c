"""Maps of numbers as colours over images, by numpy alone: fast enough for every step of a sampling.

Shapes: N images of H x W pixels, S tokens of an image, a square number whose root divides H and W.
"""

import functools

import numpy as np

COLOURS = "inferno"
"""Matplotlib's name of the scale, of the figures too."""


def colours(values: np.ndarray, top: float) -> np.ndarray:
    """Colours (..., 3) uint8 of `values` (...), from 0 to `top`; what is above has the last one."""
    place = np.clip(np.asarray(values, np.float64) / top, 0, 1) * 255
    return _table()[np.rint(place).astype(np.uint8)]


def overlay(images: np.ndarray, maps: np.ndarray, top: float, strength: float = 0.7) -> np.ndarray:
    """Images in grey under the colours of their maps: (N, H, W, 3) uint8.

    Args:
        images: (N, H, W, 3) uint8.
        maps: (N, S) a number for each token.
        top: the number that has the last colour.
        strength: share of the colour in each pixel, the rest being the image's.
    """
    N, H, W, _ = images.shape
    side = round(maps.shape[-1] ** 0.5)
    cells = colours(maps.reshape(N, side, side), top).astype(np.float32)
    cells = cells.repeat(H // side, axis=1).repeat(W // side, axis=2)
    grey = images.mean(axis=-1, keepdims=True, dtype=np.float32)
    return np.rint(strength * cells + (1 - strength) * grey).astype(np.uint8)


@functools.cache
def _table() -> np.ndarray:
    """(256, 3) uint8."""
    from matplotlib import colormaps

    return (colormaps[COLOURS](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
