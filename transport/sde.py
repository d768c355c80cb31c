"""Stochastic sampling: dx = (v + w s) dt + sqrt(2 w) dW, which keeps the marginals of the ODE.

For any w(t) >= 0, with velocity v and score s (SiT, Ma et al. 2024, Eq. 6 with time running
towards the data, w half of its squared diffusion).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from core.types import Draw
from transport.path import Path

DIFFUSIONS: dict[str, Callable[[Path, Tensor, float], Tensor]] = {
    "constant": lambda path, t, norm: norm * torch.ones_like(t),
    "sbdm": lambda path, t, norm: norm * path.score_gain(t),
    "sigma": lambda path, t, norm: norm * path.sigma(t),
    "linear": lambda path, t, norm: norm * (1 - t),
    "decreasing": lambda path, t, norm: (norm * torch.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda path, t, norm: norm * torch.sin(math.pi * t) ** 2,
}
"""w(t) by the name in `sampling.diffusion_form`: (path, t, norm) -> w of the shape of t."""

Fields = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x (B, ...), t scalar tensor) -> velocity and score, (B, ...) each, from one evaluation."""

Diffusion = Callable[[Tensor], Tensor]
"""w(t)."""


def euler_maruyama(
    fields: Fields, diffusion: Diffusion, x: Tensor, grid: Tensor, draw: Draw
) -> Tensor:
    """One evaluation and one draw for each step along the rising times `grid`."""
    for now, then in itertools.pairwise(grid):
        w = diffusion(now)
        drift = _drift(fields, w, x, now)
        x = x + (then - now) * drift + (2 * w * (then - now)).sqrt() * draw()
    return x


def stochastic_heun(
    fields: Fields, diffusion: Diffusion, x: Tensor, grid: Tensor, draw: Draw
) -> Tensor:
    """Noise first, then Heun's step of the drift: two evaluations for each step along `grid`."""
    for now, then in itertools.pairwise(grid):
        w = diffusion(now)
        x = x + (2 * w * (then - now)).sqrt() * draw()
        slope = _drift(fields, w, x, now)
        ahead = _drift(fields, diffusion(then), x + (then - now) * slope, then)
        x = x + (then - now) * (slope + ahead) / 2
    return x


def _drift(fields: Fields, w: Tensor, x: Tensor, t: Tensor) -> Tensor:
    velocity, score = fields(x, t)
    return velocity + w * score


SOLVERS = {"euler_maruyama": euler_maruyama, "stochastic_heun": stochastic_heun}
"""Stochastic samplers by name."""


def last_step(
    rule: str,
    path: Path,
    fields: Fields,
    diffusion: Diffusion,
    x: Tensor,
    t: Tensor,
    size: float,
) -> Tensor:
    """From `t` to the data without noise, where score and noise would blow up.

    Args:
        rule: `mean`, a step of the drift; `euler`, a step of the velocity; `tweedie`, the
            expected data E[x | x_t] = (x_t + sigma^2 s) / alpha; `none`, x as it is.
        path: gives alpha and sigma.
        fields: velocity and score.
        diffusion: w(t).
        x: (B, ...) the state at `t`.
        t: scalar tensor.
        size: length of the step in time.
    """
    if rule == "none":
        return x
    velocity, score = fields(x, t)
    if rule == "mean":
        return x + size * (velocity + diffusion(t) * score)
    if rule == "euler":
        return x + size * velocity
    if rule == "tweedie":
        return (x + path.sigma(t) ** 2 * score) / path.alpha(t)
    raise ValueError(f"last_step: unknown {rule!r}; known: none, mean, euler, tweedie")
