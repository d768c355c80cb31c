"""Golden cases of DDPM: tables of respaced chains, losses, samples of a linear model."""

import torch
import torch.nn.functional as F
from case import Case, LinearModel, Tensors
from torch import Tensor

from config.objective import DDPMConfig
from core.types import ModelOutput, RoutingRecord
from diffusion.gaussian import GaussianDiffusion
from diffusion.objective import DDPM
from diffusion.sampler import ddim_inverse_step, ddim_sample, ddpm_sample

TABLE_NAMES = {
    "alphas_cumprod": "alpha_bar",
    "alphas_cumprod_next": "alpha_bar_next",
    "alphas_cumprod_prev": "alpha_bar_prev",
    "betas": "beta",
    "log_one_minus_alphas_cumprod": "log_noise_variance",
    "posterior_log_variance_clipped": "log_posterior_variance",
    "posterior_mean_coef1": "posterior_x0",
    "posterior_mean_coef2": "posterior_xt",
    "posterior_variance": "posterior_variance",
    "sqrt_alphas_cumprod": "signal",
    "sqrt_one_minus_alphas_cumprod": "sigma",
    "sqrt_recip_alphas_cumprod": "inverse_signal",
    "sqrt_recipm1_alphas_cumprod": "noise_to_signal",
}


def objective(options: dict, respacing: str) -> DDPM:
    """Ours for the keywords with which the published code makes a chain."""
    loss = "rescaled_mse" if options.get("rescale_learned_sigmas") else "mse"
    config = DDPMConfig(
        num_timesteps=options.get("diffusion_steps", 1000),
        noise_schedule=options.get("noise_schedule", "linear"),
        timestep_respacing=options.get("timestep_respacing", respacing),
        prediction="start_x" if options.get("predict_xstart") else "epsilon",
        variance_type="fixed_small" if options.get("sigma_small") else "fixed_large",
        loss="kl" if options.get("use_kl") else loss,
    )
    return DDPM(config)


class Schedule(Case):
    """out.<spec>.<table>."""

    def run(self) -> Tensors:
        for spec, options in self.config["specs"].items():
            chain = objective(options, "").diffusion
            self.put(f"out.{spec}.timestep_map", chain.timesteps)
            for theirs, ours in TABLE_NAMES.items():
                self.put(f"out.{spec}.{theirs}", getattr(chain.tables, ours))
        return self.results


class Linear(Case):
    """Cases with the model W x + b t / 1000 + c[y]."""

    def model(self, options: dict) -> LinearModel:
        weight, offset, table = self.inputs("W", "b", "c")
        half = len(weight) // 2
        outputs = None if options.get("learn_sigma", True) else half
        return LinearModel(weight, offset, table, time_scale=1 / 1000, outputs=outputs)


class Losses(Linear):
    """out.<variant>.*, grad.<variant>.W, the forward chain, and the loss with capacity records."""

    def run(self) -> Tensors:
        respacing = self.config.get("timestep_respacing", "")
        for variant, options in self.config["variants"].items():
            self.losses(variant, options, respacing)
            self.reverse_step(variant, options, respacing)
        self.forward_chain(objective({}, respacing).diffusion)
        if self.wants("out.diffmoe."):
            self.with_capacity(respacing)
        return self.results

    def losses(self, variant: str, options: dict, respacing: str) -> None:
        model = self.model(options)
        x, y, t, noise = self.inputs("x", "y", "t", "noise")
        terms = objective(options, respacing).losses_at(model, x, y, t, noise)
        terms.per_sample.mean().backward()
        self.put(f"out.{variant}.loss", terms.per_sample)
        self.put(f"out.{variant}.model_t", model.times[0])
        for name, value in terms.named.items():
            self.put(f"out.{variant}.{name}", value)
        self.put(f"grad.{variant}.W", model.weight.grad)

    def reverse_step(self, variant: str, options: dict, respacing: str) -> None:
        chain = objective(options, respacing).diffusion
        x, t, y, noise = self.inputs("x", "t", "y", "noise")
        x_t = chain.q_sample(x, t, noise)
        with torch.no_grad():
            prediction = self.model(options)(x_t, chain.timesteps[t], y).prediction
        for clip in (0, 1):
            step = chain.p_mean_variance(prediction, x_t, t, clip=bool(clip))
            self.put(f"out.{variant}.p_mean.clip{clip}", step.mean)
            self.put(f"out.{variant}.p_log_variance.clip{clip}", step.log_variance)
            self.put(f"out.{variant}.p_pred_xstart.clip{clip}", step.x0)

    def forward_chain(self, chain: GaussianDiffusion) -> None:
        x, t, noise = self.inputs("x", "t", "noise")
        self.put("out.q_sample", chain.q_sample(x, t, noise))
        forward = chain.q_mean_variance(x, t)
        self.put("out.q_mean_variance.mean", forward.mean)
        self.put("out.q_mean_variance.log_variance", forward.log_variance)
        self.put("out.q_mean_variance.variance", forward.log_variance.exp())
        # Recorded with the noise itself in the place of x_t.
        posterior = chain.q_posterior(x, noise, t)
        self.put("out.q_posterior.mean", posterior.mean)
        self.put("out.q_posterior.log_variance", posterior.log_variance)
        variance = chain.at("posterior_variance", t, x).expand_as(x)
        self.put("out.q_posterior.variance", variance)
        self.put("out.prior_bpd", chain.prior_bpd(x))

    def with_capacity(self, respacing: str) -> None:
        """The trainer's sum: the objective's loss, and the losses in the records it hands on."""
        x, y, t, noise, taken, logits = self.inputs("x", "y", "t", "noise", "ones", "pc")
        logits = logits.clone().requires_grad_()
        linear = self.model({})
        # Two layers; the second was recorded with the signs turned.
        bce = {
            1: F.binary_cross_entropy_with_logits(logits, taken),
            3: F.binary_cross_entropy_with_logits(-logits, taken),
        }
        weight = self.config["capacity_weight"]
        counts = taken.sum(dim=1).long()
        records = [
            RoutingRecord(counts, taken.shape[1], {"capacity": weight * loss})
            for loss in bce.values()
        ]

        def model(x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
            return ModelOutput(linear(x, t, cond).prediction, records)

        terms = objective({}, respacing).losses_at(model, x, y, t, noise)
        loss = terms.per_sample.mean() + sum(r.losses["capacity"] for r in terms.routing)
        loss.backward()
        self.put("out.diffmoe.loss", loss)
        for name, value in terms.named.items():
            self.put(f"out.diffmoe.{name}", value)
        for layer, raw in bce.items():
            self.put(f"out.diffmoe.Capacity_Pred_loss_{layer}", raw)
        self.put("grad.diffmoe.W", linear.weight.grad)
        self.put("grad.diffmoe.pc", logits.grad)


KINDS = {
    "learned": {},
    "fixed_large": {"learn_sigma": False},
    "fixed_small": {"learn_sigma": False, "sigma_small": True},
    "xstart": {"predict_xstart": True},
}


class Sample(Linear):
    """out.p_sample.*, out.ddim.*, out.ddim_reverse."""

    def run(self) -> Tensors:
        z, y, step_noise = self.inputs("z", "y", "step_noise")
        spacing = self.config["respacing"]
        for kind, options in KINDS.items():
            for clip in (0, 1):
                model, draw = self.model(options), iter(step_noise).__next__
                chain = objective(options, spacing["p"]).diffusion
                x = ddpm_sample(chain, model, z, y, draw, clip=bool(clip))
                self.put(f"out.p_sample.{kind}.clip{clip}", x)
                times = torch.stack([t[0] for t in model.times])
                self.put(f"out.p_sample.{kind}.model_t", times)
        chain = objective({}, spacing["ddim"]).diffusion
        self.put("out.ddim.timestep_map", chain.timesteps)
        for eta in {float(f"{a[3:]}.{b}") for a, b, _ in self.etas()}:
            for clip in (0, 1):
                draw, model = iter(step_noise).__next__, self.model({})
                x = ddim_sample(chain, model, z, y, draw, clip=bool(clip), eta=eta)
                self.put(f"out.ddim.eta{eta}.clip{clip}", x)
        self.reverse(chain)
        return self.results

    def etas(self) -> list[list[str]]:
        return [parts for parts in self.keys("out.ddim.") if parts[0].startswith("eta")]

    def reverse(self, chain: GaussianDiffusion) -> None:
        """One step of each sample towards the noise, from steps 0, 3 and 8 of the ten."""
        z, y = self.inputs("z", "y")
        t = torch.tensor([0, 3, 8]).repeat(len(z))[: len(z)]
        with torch.no_grad():
            prediction = self.model({})(z, chain.timesteps[t], y).prediction
        self.put("out.ddim_reverse", ddim_inverse_step(chain, prediction, z, t))
