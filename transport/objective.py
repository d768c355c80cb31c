"""Rectified flow as an objective: velocity matching, and sampling by an ODE solver."""

import torch
from torch import Tensor

from config.schema import SAMPLERS, SamplingConfig
from core.errors import unknown_name
from core.types import Draw, LossTerms, Model
from transport.ode import dopri5, euler, heun
from transport.path import interpolate, velocity


class RectifiedFlow:
    """Flow matching on the straight path (Eq. 31), with t uniform in [0, 1).

    A model with twice the channels (`learn_sigma`) has its first half taken as the velocity.
    """

    samplers = SAMPLERS["flow"]

    def training_losses(
        self, model: Model, x: Tensor, cond: Tensor, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Squared error of the velocity at times and noise drawn from `generator`.

        Args:
            model: (x_t, t, cond) -> ModelOutput.
            x: (B, C, H, W) data.
            cond: conditions, handed on.
            generator: on the device of `x`.
        """
        t = torch.rand(len(x), generator=generator, device=x.device)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return self.losses_at(model, x, cond, t, noise)

    def losses_at(
        self, model: Model, x: Tensor, cond: Tensor, t: Tensor, noise: Tensor
    ) -> LossTerms:
        """The loss at given times (B,) and noise (B, C, H, W)."""
        output = model(interpolate(x, noise, t), t, cond)
        error = output.prediction[:, : x.shape[1]].float() - velocity(x, noise)
        mse = error.square().flatten(1).mean(dim=1)
        return LossTerms(mse, {"mse": mse}, output.routing)

    def sample(
        self, model: Model, noise: Tensor, cond: Tensor, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """Follow the model's velocity from `noise` (B, C, H, W) at t = 0 to t = 1.

        Raises:
            UserError: for a sampler that is not one of `samplers`.
        """

        def field(x: Tensor, t: Tensor) -> Tensor:
            return model(x, t.expand(len(x)), cond).prediction[:, : noise.shape[1]]

        if settings.sampler == "euler":
            return euler(field, noise, settings.num_steps)
        if settings.sampler == "heun":
            return heun(field, noise, settings.num_steps)
        if settings.sampler == "dopri5":
            return dopri5(field, noise, settings.atol, settings.rtol)
        raise unknown_name("sampling.sampler", settings.sampler, self.samplers)
