"""Precision and recall with the rounding of ADM's evaluator: distances in float16.

The published numbers of ADM and its successors have it. A block of distances that leaves the range
of float16 is computed again in float32. The blocks are therefore part of the result.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 10_000
"""Rows and columns of a block in ADM's evaluator."""


def adm_memberships(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Which rows of each set lie in the manifold of the other.

    Args:
        reference: (N, D) float32.
        samples: (M, D) float32.
        k: neighbour that gives a ball its radius; the row itself is the 0th.
        block: rows and columns of a block.

    Returns:
        (N,) and (M,) bool.
    """
    x, y = torch.from_numpy(reference), torch.from_numpy(samples)
    x_radii, y_radii = _radii(x, k, block), _radii(y, k, block)
    x_in = torch.zeros(len(x), dtype=torch.bool)
    y_in = torch.zeros(len(y), dtype=torch.bool)
    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for j in range(0, len(y), block):
            columns = slice(j, j + block)
            distances = _distances(x[rows], y[columns])
            x_in[rows] |= (distances <= y_radii[columns]).any(dim=1)
            y_in[columns] |= (distances <= x_radii[rows, None]).any(dim=0)
    return x_in, y_in


def adm_precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int = 3, block: int = BLOCK
) -> tuple[float, float]:
    """Precision and recall from `adm_memberships`."""
    reference_in, samples_in = adm_memberships(reference, samples, k, block)
    return float(samples_in.double().mean()), float(reference_in.double().mean())


def _radii(x: Tensor, k: int, block: int) -> Tensor:
    parts = []
    for i in range(0, len(x), block):
        nearest = torch.full((len(x[i : i + block]), k + 1), torch.inf)
        for j in range(0, len(x), block):
            distances = _distances(x[i : i + block], x[j : j + block])
            both = torch.cat([nearest, distances], dim=1)
            nearest = both.topk(k + 1, largest=False).values
        parts.append(nearest.amax(dim=1))
    return torch.cat(parts)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of a block as float32, rounded to float16 where they fit."""
    half = _expanded(x.half(), y.half())
    return half.float() if bool(half.isfinite().all()) else _expanded(x, y)


def _expanded(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(dim=1)[:, None], y.square().sum(dim=1)
    return (norms[0] - 2 * (x @ y.T) + norms[1]).clamp(min=0)
