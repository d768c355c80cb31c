"""Noise schedules and everything that follows from them, in float64.

A chain of T steps is given by its variances beta_t; step 0 is nearest the data.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from core.errors import UserError, unknown_name


def linear_betas(num_timesteps: int) -> Tensor:
    """(T,) evenly rising variances, 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, Sec. 4).

    Other lengths scale both ends by 1000 / T, so that the chain destroys as much signal.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)


def squaredcos_betas(num_timesteps: int) -> Tensor:
    """(T,) variances of a squared-cosine alpha_bar (Nichol & Dhariwal 2021, Eq. 17).

    Capped at 0.999, since alpha_bar reaches 0 at the last step.
    """
    offset = 0.008
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos((u + offset) / (1 + offset) * (math.pi / 2)) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear_betas,
    "squaredcos_cap_v2": squaredcos_betas,
}
"""Noise schedules by name: steps T -> betas (T,) float64."""


def named_betas(name: str, num_timesteps: int) -> Tensor:
    """(T,) float64 variances of a schedule from `SCHEDULES`.

    Raises:
        UserError: for an unknown name, or a length at which a beta would leave (0, 1).
    """
    if name not in SCHEDULES:
        raise unknown_name("objective.noise_schedule", name, SCHEDULES)
    if num_timesteps < 1:
        raise UserError(f"objective.num_timesteps: {num_timesteps} must be at least 1")
    betas = SCHEDULES[name](num_timesteps)
    if betas.max() >= 1:
        raise UserError(
            f"objective.num_timesteps: {num_timesteps} is too few for the {name} schedule, "
            f"whose largest beta would be {betas.max():.3g}; take more steps"
        )
    return betas


@dataclass(frozen=True)
class ChainTables:
    """Constants of each step of a chain, (T,) float64 each.

    With alpha = 1 - beta and alpha_bar = cumulative product of alpha; equations of Ho et al. 2020.

    Attributes:
        beta: variance that a step adds.
        alpha_bar: share of signal variance after the step.
        alpha_bar_prev: the same one step nearer the data, 1 at step 0.
        alpha_bar_next: the same one step nearer the noise, 0 at the last step.
        signal: sqrt(alpha_bar), factor of the data in x_t (Eq. 4).
        sigma: sqrt(1 - alpha_bar), factor of the noise in x_t (Eq. 4).
        log_noise_variance: log(1 - alpha_bar).
        inverse_signal: 1 / sqrt(alpha_bar).
        noise_to_signal: sqrt(1 / alpha_bar - 1).
        posterior_x0: factor of x_0 in the posterior mean (Eq. 7).
        posterior_xt: factor of x_t in the posterior mean (Eq. 7).
        posterior_variance: beta tilde (Eq. 7), 0 at step 0.
        log_posterior_variance: its log, finite at step 0 where the value of step 1 stands in.
        log_beta: log(beta), upper end of a learned variance.
        log_fixed_large: log(beta), at step 0 that of `log_posterior_variance`.
    """

    beta: Tensor
    alpha_bar: Tensor
    alpha_bar_prev: Tensor
    alpha_bar_next: Tensor
    signal: Tensor
    sigma: Tensor
    log_noise_variance: Tensor
    inverse_signal: Tensor
    noise_to_signal: Tensor
    posterior_x0: Tensor
    posterior_xt: Tensor
    posterior_variance: Tensor
    log_posterior_variance: Tensor
    log_beta: Tensor
    log_fixed_large: Tensor

    @classmethod
    def from_betas(cls, betas: Tensor) -> "ChainTables":
        """All tables of the chain with variances `betas` (T,), each in (0, 1)."""
        beta = betas.to(torch.float64)
        if beta.ndim != 1 or len(beta) == 0 or not bool(((beta > 0) & (beta < 1)).all()):
            raise ValueError("betas must be a non-empty vector with all values in (0, 1)")
        alpha_bar = torch.cumprod(1 - beta, dim=0)
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        noise_variance = 1 - alpha_bar
        posterior_variance = beta * (1 - before) / noise_variance
        # A chain of one step has no step 1 to lend its value; beta keeps the log finite there.
        stand_in = posterior_variance[1:2] if len(beta) > 1 else beta
        return cls(
            beta=beta,
            alpha_bar=alpha_bar,
            alpha_bar_prev=before,
            alpha_bar_next=torch.cat([alpha_bar[1:], alpha_bar.new_zeros(1)]),
            signal=alpha_bar.sqrt(),
            sigma=noise_variance.sqrt(),
            log_noise_variance=noise_variance.log(),
            inverse_signal=alpha_bar.rsqrt(),
            noise_to_signal=(1 / alpha_bar - 1).sqrt(),
            posterior_x0=beta * before.sqrt() / noise_variance,
            posterior_xt=(1 - beta).sqrt() * (1 - before) / noise_variance,
            posterior_variance=posterior_variance,
            log_posterior_variance=torch.cat([stand_in, posterior_variance[1:]]).log(),
            log_beta=beta.log(),
            log_fixed_large=torch.cat([stand_in, beta[1:]]).log(),
        )

    def to(self, device: torch.device) -> "ChainTables":
        """The same tables on `device`."""
        return ChainTables(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})
