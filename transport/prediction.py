"""What a model may predict, and how velocity, score and data follow from it.

Velocity v, noise, score s = -noise / sigma and data x of one point x_t determine each other
(SiT, Ma et al. 2024, Sec. 2 and Appendix A).
"""

from collections.abc import Callable

from torch import Tensor

from transport.path import Path, expand

Convert = Callable[[Path, Tensor, Tensor, Tensor], Tensor]
"""(path, prediction (B, ...), x_t (B, ...), t (B,)) -> a quantity (B, ...)."""


def score_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """s = (v - growth x_t) / score_gain, written with 1 / growth so that t = 0 is regular."""
    t = expand(t, x_t)
    inverse = path.alpha(t) / path.d_alpha(t)
    sigma = path.sigma(t)
    return (inverse * v - x_t) / (sigma**2 - inverse * path.d_sigma(t) * sigma)


def noise_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The noise with which `v` is the velocity at `x_t`."""
    t = expand(t, x_t)
    inverse = path.alpha(t) / path.d_alpha(t)
    return (inverse * v - x_t) / (inverse * path.d_sigma(t) - path.sigma(t))


def velocity_from_score(path: Path, s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """v = growth x_t + score_gain s."""
    t = expand(t, x_t)
    return path.growth(t) * x_t + path.score_gain(t) * s


def score_from_noise(path: Path, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """s = -noise / sigma."""
    return -noise / path.sigma(expand(t, x_t))


def velocity_from_noise(path: Path, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The velocity at `x_t` if it holds `noise`."""
    return velocity_from_score(path, score_from_noise(path, noise, x_t, t), x_t, t)


def velocity_from_data(
    path: Path, x: Tensor, x_t: Tensor, t: Tensor, t_eps: float = 0.05
) -> Tensor:
    """v = (sigma' x_t + (alpha' sigma - alpha sigma') x) / max(sigma, t_eps).

    For the straight path (x - x_t) / max(1 - t, t_eps), as JiT has it.
    """
    t = expand(t, x_t)
    sigma, d_sigma = path.sigma(t), path.d_sigma(t)
    wronskian = path.d_alpha(t) * sigma - path.alpha(t) * d_sigma
    return (d_sigma * x_t + wronskian * x) / sigma.clamp(min=t_eps)


def score_from_data(path: Path, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """s = (alpha x - x_t) / sigma^2."""
    t = expand(t, x_t)
    return (path.alpha(t) * x - x_t) / path.sigma(t) ** 2


def _as_it_is(path: Path, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    return prediction


def data_from_velocity(path: Path, v: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x = (sigma v - sigma' x_t) / (alpha' sigma - alpha sigma'), regular at t = 0.

    For the straight path x_t + (1 - t) v.
    """
    t = expand(t, x_t)
    sigma, d_sigma = path.sigma(t), path.d_sigma(t)
    return (sigma * v - d_sigma * x_t) / (path.d_alpha(t) * sigma - path.alpha(t) * d_sigma)


def data_from_noise(path: Path, noise: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x = (x_t - sigma noise) / alpha; without bounds where alpha is 0."""
    t = expand(t, x_t)
    return (x_t - path.sigma(t) * noise) / path.alpha(t)


def data_from_score(path: Path, s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """x = (x_t + sigma^2 s) / alpha, the expected data (Tweedie)."""
    t = expand(t, x_t)
    return (x_t + path.sigma(t) ** 2 * s) / path.alpha(t)


TO_VELOCITY: dict[str, Convert] = {
    "velocity": _as_it_is,
    "noise": velocity_from_noise,
    "score": velocity_from_score,
    "x": velocity_from_data,
}
"""By the name in `objective.prediction`: the velocity that a prediction stands for."""

TO_SCORE: dict[str, Convert] = {
    "velocity": score_from_velocity,
    "noise": score_from_noise,
    "score": _as_it_is,
    "x": score_from_data,
}
"""By the name in `objective.prediction`: the score that a prediction stands for."""

TO_DATA: dict[str, Convert] = {
    "velocity": data_from_velocity,
    "noise": data_from_noise,
    "score": data_from_score,
    "x": _as_it_is,
}
"""By the name in `objective.prediction`: the data that a prediction stands for."""
