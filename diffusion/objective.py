"""The DDPM objective: what to train on, and how to sample from the result."""

import torch
from torch import Tensor

from config.objective import DDPMConfig, SamplingConfig
from core.conditions import Condition
from core.errors import UserError, unknown_name
from core.types import Draw, LossTerms, Model
from diffusion.gaussian import GaussianDiffusion
from diffusion.respace import kept_timesteps, respaced_betas
from diffusion.sampler import SAMPLERS
from diffusion.schedule import named_betas


class DDPM:
    """Denoising diffusion over discrete steps (Ho et al. 2020; Nichol & Dhariwal 2021).

    Implements `core.types.Objective`. The variance is learned if and only if the model predicts
    2C channels for data of C.

    Args:
        config: the chain, what is predicted, the loss.
    """

    samplers: tuple[str, ...] = tuple(SAMPLERS)

    def __init__(self, config: DDPMConfig):
        self.config = config
        self.betas = named_betas(config.noise_schedule, config.num_timesteps)
        kept = kept_timesteps(config.num_timesteps, config.timestep_respacing)
        self.diffusion = self._chain(kept)
        self.whole = self._chain(list(range(config.num_timesteps)))

    def training_losses(
        self, model: Model, x: Tensor, cond: Condition, generator: torch.Generator | None = None
    ) -> LossTerms:
        """Loss on data `x` (B, C, H, W) at uniform timesteps.

        Args:
            model: called once, with x_t, t in 0 ... T - 1 and `cond`.
            x: data.
            cond: conditions of the samples.
            generator: of timesteps and noise, on the device of `x`; None is the global one.
        """
        t = torch.randint(
            self.diffusion.num_timesteps, (len(x),), generator=generator, device=x.device
        )
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        return self.losses_at(model, x, cond, t, noise)

    def time_of(self, u: Tensor) -> Tensor:
        """Steps of the chain at the shares `u` (B,) in [0, 1) of it."""
        return (u * self.diffusion.num_timesteps).long()

    def losses_at(
        self, model: Model, x: Tensor, cond: Condition, t: Tensor, noise: Tensor
    ) -> LossTerms:
        """Loss on data `x` at given steps `t` (B,) of the chain, with given `noise` (B, C, H, W).

        `named` has `mse`, and `vb` if the variance is learned; their sum is the loss.
        """
        x_t = self.diffusion.q_sample(x, t, noise)
        output = model(x_t, self.diffusion.model_time(t), cond)
        terms = self.diffusion.loss_terms(output.prediction, x, x_t, t, noise, self.config.loss)
        per_sample = torch.stack(list(terms.values())).sum(dim=0)
        named = {name: term.detach() for name, term in terms.items()}
        level = t / self.diffusion.num_timesteps
        target = noise if self.config.prediction == "epsilon" else x
        return LossTerms(per_sample, named, output.routing, level, target)

    def sample(
        self, model: Model, noise: Tensor, cond: Condition, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """Data (B, C, H, W) from `noise` of that shape.

        The implied data is not clipped unless that is asked for: latents have no bounds.

        Args:
            model: called once per step with x_t, the trained chain's t, and `cond`.
            noise: standard normal, x at the last step.
            cond: conditions of the samples.
            settings: `sampler`, `num_steps`, `ddim_eta`, `clip_denoised`; no sampler means `ddpm`.
            draw: noise of one step, for `ddpm`, and for `ddim` with an eta.

        Raises:
            UserError: for an unknown sampler or a number of steps outside 1 ... T.
        """
        name = self.samplers[0] if settings.sampler is None else settings.sampler
        if name not in SAMPLERS:
            raise unknown_name("sampling.sampler", name, SAMPLERS)
        chain, options = self.respaced(settings.num_steps), {"clip": settings.clip_denoised}
        if name == "ddim":
            options["eta"] = settings.ddim_eta
        return SAMPLERS[name](chain, model, noise, cond, draw, **options)

    def data_of(self, x: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The data that a prediction (B, C or 2C, H, W) for `x` (B, C, H, W) at `t` (B,) means.

        `t` are steps of the whole chain, 0 ... T - 1, whichever of them are walked.
        """
        return self.whole.p_mean_variance(prediction, x, t).x0

    @torch.no_grad()
    def bits_per_dim(
        self, model: Model, x: Tensor, cond: Condition, settings: SamplingConfig, draw: Draw
    ) -> Tensor:
        """(B,) the variational bound of data `x` (B, C, H, W) over all steps of the chain (Eq. 5).

        L_0 counts `x` as 8-bit values scaled to [-1, 1]: for pixels a bound on their code length,
        for latents a number to compare models of one VAE by.

        Args:
            model: called once per step.
            x: data.
            cond: conditions of the samples.
            settings: not looked at; the trained chain is walked.
            draw: fresh noise of one step.
        """
        total = self.diffusion.prior_bpd(x)
        for step in range(self.diffusion.num_timesteps):
            t = torch.full((len(x),), step, device=x.device)
            x_t = self.diffusion.q_sample(x, t, draw())
            prediction = model(x_t, self.diffusion.model_time(t), cond).prediction
            total = total + self.diffusion.variational_bound(prediction, x, x_t, t)
        return total

    def respaced(self, num_steps: int) -> GaussianDiffusion:
        """The chain through `num_steps` evenly spaced steps, the last one among them."""
        total = len(self.betas)
        if not 1 <= num_steps <= total:
            raise UserError(
                f"sampling.num_steps: {num_steps} must be between 1 and "
                f"objective.num_timesteps, {total}"
            )
        # The spec "1" keeps step 0, but sampling starts from pure noise.
        kept = [total - 1] if num_steps == 1 else kept_timesteps(total, str(num_steps))
        return self._chain(kept)

    def _chain(self, kept: list[int]) -> GaussianDiffusion:
        return GaussianDiffusion(
            respaced_betas(self.betas, kept),
            kept,
            self.config.prediction,
            self.config.variance_type,
        )
