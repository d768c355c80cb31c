"""Solving dx/dt = f(x, t) along a grid of times, and the likelihood of data under such a flow."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

from config.objective import ADAPTIVE

Field = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t scalar tensor) -> dx/dt (B, ...)."""

HEUN_THEN_EULER = "heun_euler"
"""Heun, but the last step by Euler (EDM, Karras et al. 2022, Algorithm 1; JiT)."""

RENAMED = {"heun": "heun2"}
"""Our names of torchdiffeq's methods where they differ."""


def solve(
    field: Callable,
    x: Tensor | tuple[Tensor, ...],
    grid: Tensor,
    method: str,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    overshoot: bool = False,
    trajectory: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """The state at the last time of `grid`, starting from `x` at the first.

    Args:
        field: derivative of the state.
        x: (B, ...), or several such tensors.
        grid: (K,) rising or falling times. Methods with fixed steps step along it, adaptive ones
            choose their own steps from its first to its last time.
        method: `heun`, `heun_euler`, or a method of torchdiffeq.
        atol: absolute tolerance of adaptive methods.
        rtol: relative tolerance of adaptive methods.
        overshoot: let adaptive methods step past the last time and interpolate back, as published
            samplers do. By default they land on it, and the field is never asked about times
            outside the grid: the model never saw them.
        trajectory: return the states at all times of `grid`, (K, B, ...), instead of the last.
    """
    if method == HEUN_THEN_EULER:
        return _heun_then_euler(field, x, grid, trajectory)
    low, high = grid.min(), grid.max()

    def bounded(t: Tensor, y: Tensor) -> Tensor:
        # The trial step that sets the size of the first one may reach beyond the end.
        return field(y, t if overshoot else t.clamp(low, high))

    # Lists become tensors in the precision of the state, as in published samplers: step sizes are
    # sensitive to such rounding.
    parts = len(x) if isinstance(x, tuple) else 1
    states = odeint(
        bounded,
        x,
        grid if trajectory else grid[[0, -1]],
        method=RENAMED.get(method, method),
        atol=[atol] * parts,
        rtol=[rtol] * parts,
        options=_options(method, grid, overshoot),
    )
    if trajectory:
        return states
    return tuple(s[-1] for s in states) if isinstance(states, tuple) else states[-1]


def _options(method: str, grid: Tensor, overshoot: bool) -> dict:
    """What torchdiffeq is told of the times, beside the first and the last."""
    if method not in ADAPTIVE:
        return {"grid_constructor": lambda f, y, t: grid}
    return {} if overshoot else {"step_t": grid[-1:]}


def _heun_then_euler(field: Callable, x: Tensor, grid: Tensor, trajectory: bool) -> Tensor:
    if trajectory:
        raise ValueError(f"trajectory: {HEUN_THEN_EULER} gives the last state only")
    before = solve(field, x, grid[:-1], "heun") if len(grid) > 2 else x
    return solve(field, before, grid[-2:], "euler")


def log_likelihood(
    field: Field,
    x: Tensor,
    grid: Tensor,
    method: str,
    probe: Tensor,
    atol: float = 1e-6,
    rtol: float = 1e-3,
    overshoot: bool = False,
) -> tuple[Tensor, Tensor]:
    """log p(x) under the flow, by the change of variables (Grathwohl et al. 2019, Eq. 8).

    log p(x) = log N(z; 0, 1) - integral of div f from noise to data; the divergence is estimated
    by probe^T (df/dx) probe (Hutchinson). Solved in the time 1 - t, which runs from data to noise.

    Args:
        field: the velocity.
        x: (B, ...) data.
        grid: rising times 1 - t.
        method: of `solve`.
        probe: like `x`, independent entries of mean 0 and variance 1, such as random signs.
        atol: absolute tolerance of adaptive methods.
        rtol: relative tolerance of adaptive methods.
        overshoot: see `solve`.

    Returns:
        (B,) log-likelihood in nats, and (B, ...) the noise z that the flow takes to `x`.
    """

    def backwards(state: tuple[Tensor, Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = state[0].detach().requires_grad_()
            slope = field(point, 1 - time)
            (gradient,) = torch.autograd.grad((slope * probe).sum(), point)
        return -slope.detach(), -(gradient * probe).flatten(1).sum(dim=1)

    start = (x, torch.zeros(len(x), dtype=x.dtype, device=x.device))
    noise, change = solve(backwards, start, grid, method, atol, rtol, overshoot)
    return normal_log_density(noise) + change, noise


def normal_log_density(z: Tensor) -> Tensor:
    """(B,) log density of (B, ...) under the standard normal distribution."""
    z = z.flatten(1)
    return -z.square().sum(dim=1) / 2 - z.shape[1] * math.log(2 * math.pi) / 2
