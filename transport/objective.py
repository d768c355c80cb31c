"""Flow matching along a path as an objective: losses, and sampling by an ODE or an SDE."""

import functools
import math

import torch
from torch import Tensor

from config.objective import SAMPLERS, FlowConfig, SamplingConfig
from core.conditions import Condition
from core.errors import UserError, unknown_name
from core.types import Draw, LossTerms, Model
from transport import ode, sde
from transport.path import PATHS, Path, expand
from transport.prediction import TO_DATA, TO_SCORE, TO_VELOCITY


class Flow:
    """Interpolants between noise (t = 0) and data (t = 1) (SiT, Ma et al. 2024).

    The defaults are rectified flow (Eq. 24-31 of DiffMoE): the straight path, its velocity
    predicted, t uniform. JiT predicts x with the weighting of the velocity, its times logit-normal.
    A model with twice the channels (`learn_sigma`) has its first half taken as the prediction.

    Args:
        config: path, prediction and weighting; by default rectified flow.
    """

    samplers = SAMPLERS["flow"]

    def __init__(self, config: FlowConfig | None = None):
        self.config = config or FlowConfig()
        self.path: Path = PATHS[self.config.path]
        own = 1e-5 if self.config.path == "vp" else 1e-3
        self.train_eps = own if self.config.train_eps is None else self.config.train_eps
        self.sample_eps = 1e-3 if self.config.sample_eps is None else self.config.sample_eps
        self.to_velocity = TO_VELOCITY[self.config.prediction]
        if self.config.prediction == "x":
            self.to_velocity = functools.partial(self.to_velocity, t_eps=self.config.t_eps)

    def training_losses(
        self, model: Model, x: Tensor, cond: Condition, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Loss at times and noise drawn from `generator`.

        Args:
            model: (x_t, t, cond) -> ModelOutput.
            x: (B, C, H, W) data.
            cond: conditions, handed on.
            generator: on the device of `x`.
        """
        t = self.time_of(torch.rand(len(x), generator=generator, device=x.device))
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return self.losses_at(model, x, cond, t, noise)

    def losses_at(
        self, model: Model, x: Tensor, cond: Condition, t: Tensor, noise: Tensor
    ) -> LossTerms:
        """The loss at given times (B,) and noise (B, C, H, W): weighted mean squared error."""
        noise = self.config.noise_scale * noise
        output = model(self.path.interpolate(x, noise, t), t, cond)
        prediction = output.prediction[:, : x.shape[1]].float()
        target = self.target(x, noise, t)
        if self.config.prediction == "score":  # in the noise's units
            prediction = self.path.sigma(expand(t, x)) * prediction
        error = (prediction - target).square().flatten(1).mean(dim=1)
        mse = error if self.config.loss_weighting == "none" else self.weight(t) * error
        return LossTerms(mse, {"mse": mse}, output.routing, 1 - t, target)

    def time_of(self, u: Tensor) -> Tensor:
        """Training times from `u` uniform in [0, 1)."""
        low, high = interval(self.config, self.train_eps)
        if self.config.time_distribution == "logit_normal":
            u = torch.sigmoid(self.config.time_mean + self.config.time_std * torch.special.ndtri(u))
        elif self.config.time_distribution == "mode":
            u = u + self.config.time_mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
        u = shifted(u, self.config.time_shift)
        return low + (high - low) * u

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the prediction is compared with; of a score that times sigma, which is bounded."""
        kind = self.config.prediction
        if kind == "velocity":
            return self.path.velocity(x, noise, t)
        if kind == "x":
            return x
        return noise if kind == "noise" else -noise

    def weight(self, t: Tensor) -> Tensor:
        """(B,) weight of the squared error.

        `velocity` makes it the squared error of the velocity that the prediction implies,
        `likelihood` a bound on the likelihood (SiT, Ma et al. 2024, Sec. 2.4; Song et al. 2021,
        Theorem 1). Both for the error of the noise; that of x counts alpha / sigma times.
        """
        sigma, gain = self.path.sigma(t), self.path.score_gain(t)
        if self.config.prediction == "x":
            alpha, sigma = self.path.alpha(t), sigma.clamp(min=self.config.t_eps)
            wronskian = self.path.d_alpha(t) * self.path.sigma(t) - alpha * self.path.d_sigma(t)
            to_velocity, to_likelihood = wronskian / sigma, wronskian * alpha / sigma**3
        else:
            to_velocity, to_likelihood = gain / sigma, gain / sigma**2
        return to_velocity**2 if self.config.loss_weighting == "velocity" else to_likelihood

    def sample(
        self, model: Model, noise: Tensor, cond: Condition, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """From `noise` (B, C, H, W) at t = 0 to data at t = 1.

        Raises:
            UserError: for a sampler that is not one of `samplers`.
        """
        if settings.sampler not in self.samplers:
            raise unknown_name("sampling.sampler", settings.sampler, self.samplers)
        if settings.sampler in sde.SOLVERS:
            return self._stochastic(model, noise, cond, settings, draw)
        times = interval(self.config, self.sample_eps)
        grid = time_grid(*times, settings.num_steps, noise, settings.time_shift)
        return ode.solve(
            self.velocity(model, cond),
            self.config.noise_scale * noise,
            grid,
            settings.sampler,
            settings.atol,
            settings.rtol,
            settings.overshoot,
        )

    def _stochastic(
        self, model: Model, noise: Tensor, cond: Condition, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """`num_steps` steps, the last of them by the rule for it where there is one."""
        rule = settings.last_step
        size = 0.0 if rule == "none" else settings.last_step_size
        times = interval(
            self.config, self.sample_eps, settings.diffusion_form, stochastic=True, last=size
        )
        steps = settings.num_steps - (rule != "none")
        grid = time_grid(*times, steps, noise, settings.time_shift)
        return self.stochastic_path(model, noise, cond, settings, draw, grid)

    def stochastic_path(
        self,
        model: Model,
        noise: Tensor,
        cond: Condition,
        settings: SamplingConfig,
        draw: Draw,
        grid: Tensor,
    ) -> Tensor:
        """The SDE along the rising times `grid`, then its last step."""
        form, norm = sde.DIFFUSIONS[settings.diffusion_form], settings.diffusion_norm

        def fields(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            t = t.expand(len(x))
            prediction = model(x, t, cond).prediction[:, : x.shape[1]]
            converts = self.to_velocity, TO_SCORE[self.config.prediction]
            return tuple(convert(self.path, prediction, x, t) for convert in converts)

        def diffusion(t: Tensor) -> Tensor:
            return form(self.path, t, norm)

        x = sde.SOLVERS[settings.sampler](fields, diffusion, noise, grid, draw)
        return sde.last_step(
            settings.last_step, self.path, fields, diffusion, x, grid[-1], settings.last_step_size
        )

    def data_of(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The data that a prediction (B, C or 2C, H, W) for `x` (B, C, H, W) at `t` (B,) means."""
        return TO_DATA[self.config.prediction](self.path, prediction[:, : x.shape[1]], x, t)

    def velocity(self, model: Model, cond: Condition) -> ode.Field:
        """The model's velocity as a field over (x, t)."""

        def field(x: Tensor, t: Tensor) -> Tensor:
            t = t.expand(len(x))
            return self.to_velocity(self.path, model(x, t, cond).prediction[:, : x.shape[1]], x, t)

        return field

    def log_likelihood(
        self, model: Model, x: Tensor, cond: Condition, settings: SamplingConfig, probe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B,) nats of data `x` (B, C, H, W), and the noise that the ODE takes to it.

        Args:
            model: differentiable in its first argument.
            x: data.
            cond: conditions, handed on.
            settings: `sampler` (an ODE method), `num_steps`, tolerances.
            probe: (B, C, H, W) random signs, for the divergence.

        Raises:
            UserError: for noise of another scale than 1.
        """
        if self.config.noise_scale != 1:
            raise UserError(
                f"objective.noise_scale: {self.config.noise_scale} has no likelihood; allowed: 1"
            )
        first, last = interval(self.config, self.sample_eps)
        return ode.log_likelihood(
            self.velocity(model, cond),
            x,
            time_grid(1 - last, 1 - first, settings.num_steps, x),
            settings.sampler,
            probe,
            settings.atol,
            settings.rtol,
            settings.overshoot,
        )

    def bits_per_dim(
        self, model: Model, x: Tensor, cond: Condition, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """(B,) -log2 of the density of data `x` (B, C, H, W), for each of its numbers.

        A density of continuous numbers: it may be negative, and compares models of one VAE.

        Args:
            model: differentiable in its first argument.
            x: data.
            cond: conditions, handed on.
            settings: `sampler` (an ODE method), `num_steps`, tolerances.
            draw: noise, whose signs probe the divergence.
        """
        nats, _ = self.log_likelihood(model, x, cond, settings, draw().sign())
        return -nats / (math.log(2) * x[0].numel())


def interval(
    config: FlowConfig,
    eps: float,
    diffusion_form: str | None = None,
    stochastic: bool = False,
    last: float = 0.0,
) -> tuple[float, float]:
    """Times between which a flow is trained or followed, short of where its formulas blow up.

    Args:
        config: path and prediction.
        eps: distance kept from such an end.
        diffusion_form: of the SDE.
        stochastic: an SDE is followed, not the ODE.
        last: length of the last step of the SDE, which begins where the interval ends.

    Returns:
        First and last time. Predicted noise and score have no velocity at t = 0 (but for VP,
        whose alpha is never 0) nor at t = 1; the score of the SDE has no value at t = 1 either.
    """
    regular = config.prediction in ("velocity", "x")
    if config.path != "vp" and regular and not stochastic:
        return 0.0, 1.0
    high = 1 - last if stochastic and last > 0 else 1 - eps
    starts_late = not regular or (stochastic and diffusion_form == "sbdm")
    return (eps if starts_late and config.path != "vp" else 0.0), high


def shifted(u: Tensor, shift: float) -> Tensor:
    """Times `u` in [0, 1] moved towards the noise (Esser et al. 2024, Eq. 23); 1 leaves them."""
    return u if shift == 1 else u / (shift - (shift - 1) * u)


def time_grid(
    first: float, last: float, num_steps: int, like: Tensor, shift: float = 1.0
) -> Tensor:
    """(num_steps + 1,) times from `first` to `last`, in the precision and place of `like`."""
    if shift == 1:
        return torch.linspace(first, last, num_steps + 1, dtype=like.dtype, device=like.device)
    u = torch.linspace(0, 1, num_steps + 1, dtype=like.dtype, device=like.device)
    return first + (last - first) * shifted(u, shift)
