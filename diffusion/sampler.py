"""From noise to data through a chain, step by step.

The model is called with the trained chain's timesteps, whatever chain is walked; conditions pass
through. Guidance, if any, is inside the model that is handed in.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from core.conditions import Condition
from core.types import Draw, Model
from diffusion.gaussian import GaussianDiffusion

Update = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, x_t, t) -> x at the next step of the walk."""


def ddpm_step(
    chain: GaussianDiffusion,
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    clip: bool = False,
) -> Tensor:
    """x_(t-1) ~ p(x_(t-1) | x_t) with standard normal `noise` (Ho et al. 2020, Algorithm 2).

    At t = 0 the mean: the result is data, without noise.
    """
    reverse = chain.p_mean_variance(prediction, x_t, t, clip)
    noisy = (t > 0).to(x_t.dtype).view(-1, *[1] * (x_t.ndim - 1))
    return reverse.mean + noisy * torch.exp(0.5 * reverse.log_variance) * noise


def ddim_step(
    chain: GaussianDiffusion,
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor | None = None,
    eta: float = 0.0,
    clip: bool = False,
) -> Tensor:
    """x_(t-1) of the non-Markovian chain (Song et al. 2021, Eq. 12 and 16).

    Args:
        chain: whose step this is.
        prediction: (B, C or 2C, H, W); a learned variance is not used.
        x_t: (B, C, H, W).
        t: (B,) step of the chain.
        noise: standard normal; needed unless eta is 0.
        eta: 0 deterministic, 1 the variance of the DDPM posterior.
        clip: hold the implied data within [-1, 1].
    """
    x0 = chain.p_mean_variance(prediction, x_t, t, clip).x0
    direction = chain.noise_from_x0(x_t, t, x0)
    before = chain.at("alpha_bar_prev", t, x_t)
    variance = eta**2 * chain.at("posterior_variance", t, x_t)
    mean = before.sqrt() * x0 + (1 - before - variance).clamp(min=0).sqrt() * direction
    if eta == 0:
        return mean
    if noise is None:
        raise ValueError(f"eta: {eta} needs noise; give noise, or eta 0")
    return mean + variance.sqrt() * noise


def ddim_inverse_step(
    chain: GaussianDiffusion, prediction: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
) -> Tensor:
    """x_(t+1) by the deterministic chain walked towards the noise (Song et al. 2021, Sec. 4.3)."""
    x0 = chain.p_mean_variance(prediction, x_t, t, clip).x0
    after = chain.at("alpha_bar_next", t, x_t)
    return after.sqrt() * x0 + (1 - after).sqrt() * chain.noise_from_x0(x_t, t, x0)


def ddpm_sample(
    chain: GaussianDiffusion,
    model: Model,
    noise: Tensor,
    cond: Condition,
    draw: Draw,
    clip: bool = False,
) -> Tensor:
    """Ancestral sampling from `noise` (B, C, H, W); `draw` is called once in every step."""

    def update(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return ddpm_step(chain, prediction, x_t, t, draw(), clip)

    return _walk(chain, model, noise, cond, reversed(range(chain.num_timesteps)), update)


def ddim_sample(
    chain: GaussianDiffusion,
    model: Model,
    noise: Tensor,
    cond: Condition,
    draw: Draw,
    clip: bool = False,
    eta: float = 0.0,
) -> Tensor:
    """DDIM from `noise` (B, C, H, W); `draw` is called once in every step, never if eta is 0."""

    def update(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        fresh = draw() if eta != 0 else None
        return ddim_step(chain, prediction, x_t, t, fresh, eta, clip)

    return _walk(chain, model, noise, cond, reversed(range(chain.num_timesteps)), update)


def ddim_invert(
    chain: GaussianDiffusion, model: Model, x: Tensor, cond: Condition, clip: bool = False
) -> Tensor:
    """The noise (B, C, H, W) that deterministic DDIM takes to data `x`, up to its step error."""

    def update(prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return ddim_inverse_step(chain, prediction, x_t, t, clip)

    return _walk(chain, model, x, cond, range(chain.num_timesteps), update)


SAMPLERS: dict[str, Callable[..., Tensor]] = {"ddpm": ddpm_sample, "ddim": ddim_sample}
"""Samplers by name: (chain, model, noise, cond, draw, clip) -> data."""


@torch.no_grad()
def _walk(
    chain: GaussianDiffusion,
    model: Model,
    x: Tensor,
    cond: Condition,
    steps: Iterable[int],
    update: Update,
) -> Tensor:
    trained = chain.timesteps.tolist()
    for step in steps:
        t = torch.full((len(x),), step, device=x.device)
        output = model(x, torch.full_like(t, trained[step]), cond)
        x = update(output.prediction, x, t)
    return x
