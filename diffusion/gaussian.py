"""The Gaussian noising chain, its reversal by a model, and the losses between the two.

Shapes: B batch, C channels, H and W height and width. `t` is (B,) int64, a step of the chain.
Equations: Ho et al. 2020 unless another paper is named.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from core.errors import unknown_name
from diffusion.schedule import ChainTables

MeanType = Literal["epsilon", "start_x"]
"""What the first C channels of a prediction are: the noise in x_t, or the data."""

VarianceType = Literal["fixed_large", "fixed_small"]
"""Reverse variance of a model that predicts none: beta, or that of the posterior (Sec. 3.2)."""

LossType = Literal["mse", "rescaled_mse", "kl"]
"""`mse` + vb; the same with vb times T / 1000; or T vb alone, the bound in bits per dimension."""


@dataclass
class Gaussian:
    """A normal distribution with diagonal covariance: mean and log variance, (B, C, H, W)."""

    mean: Tensor
    log_variance: Tensor


@dataclass
class ReverseStep(Gaussian):
    """The model's p(x_(t-1) | x_t), and the data x0 (B, C, H, W) that its mean rests on."""

    x0: Tensor


def mean_over_sample(x: Tensor) -> Tensor:
    """(B,) mean over all dimensions but the first."""
    return x.flatten(start_dim=1).mean(dim=1)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of each element, in nats."""
    log_ratio = p.log_variance - q.log_variance
    shift = (p.mean - q.mean).square() * torch.exp(-q.log_variance)
    # In this order, although expm1 would lose less: published bounds carry its rounding.
    return 0.5 * (-1 - log_ratio + torch.exp(log_ratio) + shift)


def decoder_nll(x0: Tensor, p: Gaussian) -> Tensor:
    """-log of the mass that `p` gives to the 8-bit bin around `x0`, per element, in nats (Eq. 13).

    `x0` counts as scaled to [-1, 1] in 256 levels; the outermost bins reach to infinity.
    Probabilities below 1e-12 are taken as that.
    """
    half_bin = 1 / 255
    precision = torch.exp(-0.5 * p.log_variance)
    centred = x0 - p.mean
    below_upper = _normal_cdf((centred + half_bin) * precision)
    below_lower = _normal_cdf((centred - half_bin) * precision)
    mass = torch.where(x0 > 0.999, 1 - below_lower, below_upper - below_lower)
    mass = torch.where(x0 < -0.999, below_upper, mass)
    return -mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    # The tanh form known from GELU, not erf: published vb values were computed with it.
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class GaussianDiffusion:
    """A chain of T noising steps and its reversal by a model's prediction.

    A prediction (B, C or 2C, H, W) of a data shape (B, C, H, W) has, in its second C channels
    where it has them, the learned variance.

    Args:
        betas: (T,) variances of the steps, in (0, 1).
        timesteps: (T,) the trained model's number of each step; by default 0 ... T - 1.
        mean_type: what the first C channels of a prediction are.
        variance_type: reverse variance where the prediction has none.
    """

    def __init__(
        self,
        betas: Tensor,
        timesteps: list[int] | None = None,
        mean_type: MeanType = "epsilon",
        variance_type: VarianceType = "fixed_large",
    ):
        if mean_type not in get_args(MeanType):
            raise unknown_name("mean_type", mean_type, get_args(MeanType))
        if variance_type not in get_args(VarianceType):
            raise unknown_name("variance_type", variance_type, get_args(VarianceType))
        self.tables = ChainTables.from_betas(betas.cpu())
        self.num_timesteps = len(betas)
        self.timesteps = torch.tensor(range(len(betas)) if timesteps is None else timesteps)
        if len(self.timesteps) != self.num_timesteps:
            raise ValueError(f"timesteps: {len(self.timesteps)} given for {len(betas)} betas")
        self.mean_type = mean_type
        self.variance_type = variance_type
        self._on_device = {torch.device("cpu"): (self.tables, self.timesteps)}

    def _tables_on(self, device: torch.device) -> tuple[ChainTables, Tensor]:
        if device not in self._on_device:
            self._on_device[device] = self.tables.to(device), self.timesteps.to(device)
        return self._on_device[device]

    def model_time(self, t: Tensor) -> Tensor:
        """(B,) the trained model's number of each step `t` of this chain."""
        return self._tables_on(t.device)[1][t]

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """Entry `t` of a table of `ChainTables`, (B, 1, 1, 1) in the dtype of `like`."""
        values = getattr(self._tables_on(t.device)[0], table)[t].to(like.dtype)
        return values.view(-1, *[1] * (like.ndim - 1))

    def q_mean_variance(self, x0: Tensor, t: Tensor) -> Gaussian:
        """q(x_t | x_0), Eq. 4."""
        log_variance = self.at("log_noise_variance", t, x0).expand_as(x0)
        return Gaussian(self.at("signal", t, x0) * x0, log_variance)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t (B, C, H, W) from data and standard normal noise, Eq. 4."""
        return self.at("signal", t, x0) * x0 + self.at("sigma", t, x0) * noise

    def q_posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_(t-1) | x_t, x_0), Eq. 6-7; at t = 0, where it is a point, with step 1's variance."""
        mean = self.at("posterior_x0", t, x_t) * x0 + self.at("posterior_xt", t, x_t) * x_t
        return Gaussian(mean, self.at("log_posterior_variance", t, x_t).expand_as(x_t))

    def x0_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The data with which `noise` gives `x_t`: Eq. 4 solved for x_0."""
        return self.at("inverse_signal", t, x_t) * x_t - self.at("noise_to_signal", t, x_t) * noise

    def noise_from_x0(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """The noise with which `x0` gives `x_t`: Eq. 4 solved for epsilon."""
        scaled = self.at("inverse_signal", t, x_t) * x_t
        return (scaled - x0) / self.at("noise_to_signal", t, x_t)

    def p_mean_variance(
        self, prediction: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
    ) -> ReverseStep:
        """The reverse step that a prediction stands for.

        Args:
            prediction: (B, C or 2C, H, W) output of the model for `x_t`.
            x_t: (B, C, H, W).
            t: (B,) step of this chain, not of the trained one.
            clip: hold the implied data within [-1, 1]; right for pixels, wrong for latents.
        """
        mean_part, variance_part = self.split(prediction, x_t)
        x0 = mean_part
        if self.mean_type == "epsilon":
            x0 = self.x0_from_noise(x_t, t, mean_part)
        if clip:
            x0 = x0.clamp(-1, 1)
        posterior = self.q_posterior(x0, x_t, t)
        return ReverseStep(posterior.mean, self._log_variance(variance_part, x_t, t), x0)

    def split(self, prediction: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean part (B, C, H, W) and variance part, the latter None without such channels.

        Both come in the dtype of `x_t`, whatever precision the model ran in.
        """
        channels = x_t.shape[1]
        prediction = prediction.to(x_t.dtype)
        if prediction.shape[1] == channels:
            return prediction, None
        if prediction.shape[1] == 2 * channels:
            return prediction[:, :channels], prediction[:, channels:]
        raise ValueError(
            f"prediction: {prediction.shape[1]} channels for data of {channels}; "
            f"must be {channels}, or {2 * channels} with a learned variance"
        )

    def _log_variance(self, variance_part: Tensor | None, x_t: Tensor, t: Tensor) -> Tensor:
        """Nichol & Dhariwal 2021, Eq. 15 with v in [-1, 1] mapped to [0, 1]; else fixed."""
        if variance_part is not None:
            upper = (variance_part + 1) / 2
            smallest = self.at("log_posterior_variance", t, x_t)
            return upper * self.at("log_beta", t, x_t) + (1 - upper) * smallest
        large = self.variance_type == "fixed_large"
        table = "log_fixed_large" if large else "log_posterior_variance"
        return self.at(table, t, x_t).expand_as(x_t)

    def variational_bound(self, prediction: Tensor, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """(B,) term of the variational bound at `t`, in bits per dimension.

        L_(t-1) of Eq. 5, at t = 0 the decoder's L_0.
        """
        model = self.p_mean_variance(prediction, x_t, t)
        kl = mean_over_sample(gaussian_kl(self.q_posterior(x0, x_t, t), model))
        nll = mean_over_sample(decoder_nll(x0, model))
        return torch.where(t == 0, nll, kl) / math.log(2)

    def prior_bpd(self, x0: Tensor) -> Tensor:
        """(B,) L_T of Eq. 5, the bound's term without parameters, in bits per dimension."""
        last = torch.full((len(x0),), self.num_timesteps - 1, device=x0.device)
        standard_normal = Gaussian(torch.zeros_like(x0), torch.zeros_like(x0))
        kl = gaussian_kl(self.q_mean_variance(x0, last), standard_normal)
        return mean_over_sample(kl) / math.log(2)

    def loss_terms(
        self,
        prediction: Tensor,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        noise: Tensor,
        loss: LossType = "mse",
    ) -> dict[str, Tensor]:
        """Parts (B,) of the loss, by name; their sum is the loss of each sample.

        `mse` is L_simple (Eq. 14). With a learned variance comes `vb`, which trains the variance
        alone: the mean is held fixed in it (Nichol & Dhariwal 2021, Sec. 3.1). The loss `kl` has
        itself as its only part.
        """
        if loss == "kl":
            bound = self.variational_bound(prediction, x0, x_t, t)
            return {"kl": self.num_timesteps * bound}
        mean_part, variance_part = self.split(prediction, x_t)
        target = noise if self.mean_type == "epsilon" else x0
        terms = {"mse": mean_over_sample((mean_part - target).square())}
        if variance_part is not None:
            held = torch.cat([mean_part.detach(), variance_part], dim=1)
            scale = self.num_timesteps / 1000 if loss == "rescaled_mse" else 1.0
            terms["vb"] = scale * self.variational_bound(held, x0, x_t, t)
        return terms
