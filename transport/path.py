"""Paths between noise and data: x_t = alpha_t x + sigma_t noise (SiT, Ma et al. 2024, Eq. 1).

Time runs as in all published code and checkpoints: t = 0 is noise, t = 1 is data. The DiffMoE
paper writes the same straight path with its t equal to our 1 - t (Eq. 24-31).

All functions of time take and return tensors of one shape; dotted quantities are derivatives
with respect to t.
"""

import math

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) shaped to broadcast over `like` (B, ...)."""
    return t.view(-1, *[1] * (like.dim() - 1))


class Path:
    """A pair of schedules alpha, sigma, given by the methods that a subclass defines.

    With score s = -noise / sigma the velocity is v = growth x_t + score_gain s.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Factor of the data."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Factor of the noise."""
        raise NotImplementedError

    def d_alpha(self, t: Tensor) -> Tensor:
        """Derivative of alpha."""
        raise NotImplementedError

    def d_sigma(self, t: Tensor) -> Tensor:
        """Derivative of sigma."""
        raise NotImplementedError

    def growth(self, t: Tensor) -> Tensor:
        """Derivative of log alpha; infinite where alpha is 0."""
        return self.d_alpha(t) / self.alpha(t)

    def score_gain(self, t: Tensor) -> Tensor:
        """growth sigma^2 - sigma sigma', the factor of the score in the velocity."""
        sigma = self.sigma(t)
        return self.growth(t) * sigma**2 - sigma * self.d_sigma(t)

    def interpolate(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for data x (B, ...), noise of that shape and times t (B,)."""
        t = expand(t, x)
        return self.alpha(t) * x + self.sigma(t) * noise

    def velocity(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt = alpha' x + sigma' noise (Eq. 28 of DiffMoE for the straight path)."""
        t = expand(t, x)
        return self.d_alpha(t) * x + self.d_sigma(t) * noise


class LinearPath(Path):
    """The straight path of rectified flow: alpha = t, sigma = 1 - t."""

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class GVPPath(Path):
    """The variance-preserving trigonometric path: alpha = sin(pi t / 2), sigma = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * math.pi / 2)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.cos(t * math.pi / 2)

    def d_alpha(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(t * math.pi / 2)

    def d_sigma(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(t * math.pi / 2)

    def growth(self, t: Tensor) -> Tensor:
        return math.pi / 2 / torch.tan(t * math.pi / 2)


class VPPath(Path):
    """The VP diffusion of Song et al. 2021: alpha = exp(l), alpha^2 + sigma^2 = 1.

    l(t) = -(1 - t)^2 (beta_max - beta_min) / 4 - (1 - t) beta_min / 2, with beta from 0.1 to 20.
    """

    beta_min = 0.1
    beta_max = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        u = 1 - t
        return -(u**2) * (self.beta_max - self.beta_min) / 4 - u * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - (2 * self._log_alpha(t)).exp()).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.alpha(t) * self.growth(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        squared = (2 * self._log_alpha(t)).exp()
        return -squared * self.growth(t) / (1 - squared).sqrt()

    def growth(self, t: Tensor) -> Tensor:
        return (1 - t) * (self.beta_max - self.beta_min) / 2 + self.beta_min / 2

    def score_gain(self, t: Tensor) -> Tensor:
        return self.growth(t)  # since alpha^2 + sigma^2 = 1


PATHS: dict[str, Path] = {"linear": LinearPath(), "gvp": GVPPath(), "vp": VPPath()}
"""Paths by the name in `objective.path`."""
