"""Solvers of dx/dt = f(x, t) from t = 0 to t = 1."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torchdiffeq import odeint

Field = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t scalar tensor) -> dx/dt (B, ...)."""


def euler(field: Field, x: Tensor, num_steps: int) -> Tensor:
    """`num_steps` equal Euler steps, one evaluation each."""
    times = _times(x, num_steps)
    for now, then in itertools.pairwise(times):
        x = x + (then - now) * field(x, now)
    return x


def heun(field: Field, x: Tensor, num_steps: int) -> Tensor:
    """`num_steps` equal steps of Heun's second-order method, two evaluations each."""
    times = _times(x, num_steps)
    for now, then in itertools.pairwise(times):
        slope = field(x, now)
        ahead = field(x + (then - now) * slope, then)
        x = x + (then - now) * (slope + ahead) / 2
    return x


def dopri5(field: Field, x: Tensor, atol: float, rtol: float) -> Tensor:
    """Adaptive Dormand-Prince 5(4).

    The last step is made to land on t = 1: left alone, the solver steps past it and
    interpolates back, and the model would be asked about times that it never saw.
    """
    times = _times(x, 1)
    end = {"step_t": times[1:]}
    return odeint(
        lambda t, y: field(y, t), x, times, method="dopri5", atol=atol, rtol=rtol, options=end
    )[-1]


def _times(x: Tensor, num_steps: int) -> Tensor:
    return torch.linspace(0, 1, num_steps + 1, dtype=x.dtype, device=x.device)
