"""Sample quality from features: Fréchet distance, Inception score, precision and recall.

Every function takes numpy arrays or torch tensors (computed on the tensor's device). All of it is
float64 inside, so that TF32 and reduced-precision settings of the process change nothing.

Shapes: N rows of a reference, M rows of samples, D features, C classes.
"""

import numpy as np
import torch
from scipy.special import rel_entr
from torch import Tensor

from core.errors import UserError

Array = np.ndarray | Tensor
BLOCK = 2048


def statistics(features: Array, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased covariance of `features` in float64.

    Args:
        features: (N, D), N at least 2, finite.
        block: rows that are held in float64 at a time.

    Returns:
        mu (D,) and sigma (D, D), float64.

    Raises:
        UserError: on another shape, fewer than two rows, or values that are not finite.
    """
    x = _features("features", features, at_least=2)
    mu = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(block):
        mu += rows.double().sum(dim=0)
    mu /= len(x)
    sigma = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(block):
        centred = rows.double() - mu
        sigma += centred.T @ centred
    sigma /= len(x) - 1
    return mu.cpu().numpy(), sigma.cpu().numpy()


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """Squared Fréchet (2-Wasserstein) distance of two Gaussians (Dowson and Landau 1982).

    |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2)). With factors
    sigma_i = L_i L_i^T the last trace is the sum of the singular values of L1^T L2: no root of a
    matrix that is not symmetric, and no root of rounding noise where a covariance is singular.

    Args:
        mu1: (D,) mean of the first.
        sigma1: (D, D) its covariance, symmetric positive semi-definite up to rounding.
        mu2: (D,) mean of the second.
        sigma2: (D, D) its covariance.

    Raises:
        UserError: when the shapes do not fit together or a value is not finite.
    """
    m1, m2 = (_tensor(m).double().cpu() for m in (mu1, mu2))
    s1, s2 = (_tensor(s).double().cpu() for s in (sigma1, sigma2))
    shapes = [tuple(a.shape) for a in (m1, s1, m2, s2)]
    width = len(m1) if m1.ndim == 1 else -1
    if shapes != [(width,), (width, width)] * 2:
        raise UserError(f"mu1, sigma1, mu2, sigma2: need (D,), (D, D), (D,), (D, D); got {shapes}")
    if not all(bool(a.isfinite().all()) for a in (m1, s1, m2, s2)):
        raise UserError("mu1, sigma1, mu2, sigma2: some values are not finite")
    trace_of_root = torch.linalg.svdvals(_factor(s1).T @ _factor(s2)).sum()
    distance = (m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * trace_of_root
    return max(0.0, float(distance))


def _factor(sigma: Tensor) -> Tensor:
    """L (D, R) with L L^T = sigma, R the numerical rank."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    kept = values > noise
    return vectors[:, kept] * values[kept].sqrt()


def inception_score(probs: Array, split_size: int = 5000) -> float:
    """Inception score (Salimans et al. 2016): exp of the mean KL(p(y|x) || p(y)), per split.

    Splits are contiguous, the last may be short, and their scores are averaged unweighted, as in
    the evaluation of Dhariwal and Nichol 2021. A probability of zero contributes zero.

    Args:
        probs: (M, C), rows are distributions over the classes.
        split_size: rows of a split.

    Raises:
        UserError: on another shape, negative or non-finite values, rows that do not sum to 1.
    """
    if split_size < 1:
        raise UserError(f"split_size: must be at least 1, got {split_size}")
    p = _features("probs", probs, at_least=1).cpu().numpy()
    if (p < 0).any() or not np.allclose(p.sum(axis=1, dtype=np.float64), 1, atol=1e-2):
        raise UserError("probs: rows must be probabilities (not negative, sum 1), not logits")
    scores = []
    for start in range(0, len(p), split_size):
        rows = p[start : start + split_size].astype(np.float64)
        divergence = rel_entr(rows, rows.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def precision_recall(
    reference: Array, samples: Array, k: int = 3, block: int = BLOCK
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019).

    Precision is the share of samples in the manifold of the reference, recall the share of the
    reference in the manifold of the samples.

    Args:
        reference: (N, D), more than `k` rows.
        samples: (M, D), more than `k` rows.
        k: neighbour that gives a ball its radius.
        block: rows and columns of the largest distance matrix held; the result is the same for
            every block.

    Raises:
        UserError: on other shapes, too few rows, or values that are not finite.
    """
    x = _features("reference", reference, at_least=k + 1)
    y = _features("samples", samples, at_least=k + 1).to(x.device)
    radii = (manifold_radii(x, k, block), manifold_radii(y, k, block))
    reference_in, samples_in = memberships(x, y, *radii, block)
    return float(samples_in.double().mean()), float(reference_in.double().mean())


def manifold_radii(features: Array, k: int = 3, block: int = BLOCK) -> Tensor:
    """Squared distance of each row to its k-th nearest other row.

    Args:
        features: (N, D), more than `k` rows.
        k: at least 1; the row itself does not count, an equal row does.
        block: as in `precision_recall`.

    Returns:
        (N,) float32.
    """
    _check_counts(k, block)
    x = _features("features", features, at_least=k + 1)
    nearest = torch.full((len(x), k), torch.inf, device=x.device)

    def take(rows: slice, distances: Tensor) -> None:
        both = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = both.topk(k, largest=False).values

    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for j in range(i, len(x), block):  # distances are symmetric
            columns = slice(j, j + block)
            distances = _squared_distances(x[rows], x[columns])
            if i == j:
                distances.fill_diagonal_(torch.inf)
            else:
                take(columns, distances.T)
            take(rows, distances)
    return nearest.amax(dim=1)


def memberships(
    x: Array, y: Array, x_radii: Array, y_radii: Array, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Which rows of each set lie in a ball around some row of the other, boundary included.

    Args:
        x: (N, D).
        y: (M, D).
        x_radii: (N,) squared, from `manifold_radii(x)`.
        y_radii: (M,) squared, from `manifold_radii(y)`.
        block: as in `precision_recall`.

    Returns:
        (N,) and (M,) bool.
    """
    _check_counts(1, block)
    x = _features("x", x, at_least=1)
    y = _features("y", y, at_least=1).to(x.device)
    radii = [_tensor(r).to(x.device, torch.float32) for r in (x_radii, y_radii)]
    shapes = [tuple(t.shape) for t in (x, y, *radii)]
    if x.shape[1] != y.shape[1] or shapes[2:] != [(len(x),), (len(y),)]:
        raise UserError(f"x, y and radii do not fit: need (N, D), (M, D), (N,), (M,), got {shapes}")
    x_in, y_in = (torch.zeros(len(t), dtype=torch.bool, device=x.device) for t in (x, y))
    for i in range(0, len(x), block):
        rows = slice(i, i + block)
        for j in range(0, len(y), block):
            columns = slice(j, j + block)
            distances = _squared_distances(x[rows], y[columns])
            x_in[rows] |= (distances <= radii[1][columns]).any(dim=1)
            y_in[columns] |= (distances <= radii[0][rows, None]).any(dim=0)
    return x_in, y_in


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (M, N) of rows (M, D) and (N, D), as float32.

    The sum |x|^2 + |y|^2 - 2 x.y cancels, and a matrix product rounds differently for every block
    shape: in float64 both stay far below what float32 keeps. What is left between equal rows is
    cut to zero, because copies make radii of zero in which copies must lie.
    """
    x, y = x.double(), y.double()
    scale = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    distances = torch.addmm(scale, x, y.T, alpha=-2)
    noise = 4 * x.shape[1] * torch.finfo(torch.float64).eps
    return distances.where(distances > noise * scale, 0.0).float()


def _check_counts(k: int, block: int) -> None:
    for name, value in (("k", k), ("block", block)):
        if value < 1:
            raise UserError(f"{name}: must be at least 1, got {value}")


def _tensor(array: Array) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    array = np.asarray(array)
    # torch warns when it is to share memory that it must not write.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _features(name: str, array: Array, at_least: int) -> Tensor:
    """`array` as a tensor, once it is a finite matrix with enough rows."""
    x = _tensor(array)
    if x.ndim != 2 or x.shape[1] == 0:
        raise UserError(f"{name}: must be a matrix (rows, columns), got shape {tuple(x.shape)}")
    if len(x) < at_least:
        raise UserError(f"{name}: needs at least {at_least} rows, got {len(x)}")
    if not bool(x.isfinite().all()):
        raise UserError(f"{name}: some values are not finite")
    return x
