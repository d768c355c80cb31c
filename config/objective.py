"""What a run can choose about its objective, and about how samples are drawn from it."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class FlowConfig:
    """Flow matching from noise (t = 0) to data (t = 1); the defaults are rectified flow.

    Attributes:
        name: which objective.
        path: x_t = alpha x + sigma noise is the `linear` (straight), `gvp` (sine and cosine) or
            `vp` (variance-preserving diffusion) one.
        prediction: what the model predicts.
        loss_weighting: weigh a predicted noise, score or x as the `velocity` or the `likelihood`
            would; `none` is the plain squared error.
        train_eps: distance that training keeps from times where the formulas blow up; by default
            1e-5 for vp, else 1e-3, and always 0 for a predicted velocity or x that is not vp.
        sample_eps: the same for sampling; by default 1e-3.
        t_eps: least sigma (1 - t on the straight path) that the velocity of a predicted x is
            divided by.
        time_distribution: training times are `uniform`, or sigmoid(N(time_mean, time_std)), or
            the `mode` sampling of Stable Diffusion 3 (Esser et al. 2024, Eq. 20).
        time_mean: of `logit_normal` times, P_mean of JiT.
        time_std: of `logit_normal` times, P_std of JiT.
        time_mode_scale: of `mode` times: above 0 favours the middle.
        time_shift: moves training times towards the noise: its share s = 1 - t becomes
            c s / (1 + (c - 1) s); 1 leaves them.
        noise_scale: standard deviation of the noise.
    """

    name: Literal["flow"] = "flow"
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score", "x"] = "velocity"
    loss_weighting: Literal["none", "velocity", "likelihood"] = "none"
    train_eps: float | None = None
    sample_eps: float | None = None
    t_eps: float = 0.05
    time_distribution: Literal["uniform", "logit_normal", "mode"] = "uniform"
    time_mean: float = -0.8
    time_std: float = 0.8
    time_mode_scale: float = 1.29
    time_shift: float = 1.0
    noise_scale: float = 1.0


@dataclass
class DDPMConfig:
    """Denoising diffusion: noise prediction over discrete steps.

    Attributes:
        name: which objective.
        num_timesteps: steps of the noising process; step 0 is nearest the data.
        noise_schedule: betas over these steps.
        timestep_respacing: train on a shorter chain: a number of steps, numbers of each section
            (10,15,20), or ddimN; by default on all steps.
        prediction: what the model predicts, the noise (`epsilon`) or the data (`start_x`).
        variance_type: reverse variance of a model that does not learn it (model.learn_sigma false).
        loss: `mse` and, for a learned variance, the bound; the same with the bound times T / 1000
            (`rescaled_mse`); or T times the bound alone (`kl`).
    """

    name: Literal["ddpm"] = "ddpm"
    num_timesteps: int = 1000
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    timestep_respacing: str = ""
    prediction: Literal["epsilon", "start_x"] = "epsilon"
    variance_type: Literal["fixed_large", "fixed_small"] = "fixed_large"
    loss: Literal["mse", "rescaled_mse", "kl"] = "mse"


ObjectiveConfig = FlowConfig | DDPMConfig


@dataclass
class SamplingConfig:
    """How samples are drawn, for grids during training and as sample_ddp.py's defaults.

    Attributes:
        sampler: flow: euler, heun, heun_euler (Heun with a last step of Euler), dopri5 or another
            ODE method of torchdiffeq, or the SDE by euler_maruyama or stochastic_heun; ddpm:
            ddpm, ddim. By default euler or ddpm.
        num_steps: steps of the sampler, the SDE's last step included; adaptive methods such as
            dopri5 choose their own.
        time_shift: moves the times of fixed steps towards the noise, as objective.time_shift does
            those of training; 1 leaves them equally long.
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        cfg_interval: guide only at times low < t < high, as the model counts them; a low of 0
            is no bound. By default always.
        cfg_channels: guide all channels of the latent, or the first 3 as DiT and SiT do.
        cfg_pooling: conditional and unconditional half in `separate` calls, or `joint` in one
            batch, whose tokens a batch-level router then pools.
        atol: absolute tolerance of adaptive methods.
        rtol: relative tolerance of adaptive methods.
        ddim_eta: noise of ddim: 0 is deterministic, 1 has the variance of ddpm.
        clip_denoised: ddpm and ddim hold the implied data within [-1, 1]; for pixels.
        overshoot: adaptive methods step past the last time and interpolate back, as published
            samplers do, asking the model about times that it never saw.
        diffusion_form: w(t) of the SDE dx = (v + w s) dt + sqrt(2 w) dW.
        diffusion_norm: factor of w(t).
        last_step: how the SDE's last step goes, without noise: a step of the drift (`mean`) or of
            the velocity (`euler`), or the expected data (`tweedie`).
        last_step_size: its length in time.
    """

    sampler: str | None = None
    num_steps: int = 250
    time_shift: float = 1.0
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] | None = None
    cfg_channels: Literal["all", "first3"] = "all"
    cfg_pooling: Literal["separate", "joint"] = "separate"
    atol: float = 1e-6
    rtol: float = 1e-3
    ddim_eta: float = 0.0
    clip_denoised: bool = False
    overshoot: bool = False
    diffusion_form: Literal[
        "constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"
    ] = "sigma"
    diffusion_norm: float = 1.0
    last_step: Literal["none", "mean", "tweedie", "euler"] = "mean"
    last_step_size: float = 0.04


OBJECTIVES = {"flow": FlowConfig, "ddpm": DDPMConfig}

ODE_METHODS = (
    *("euler", "heun", "heun_euler", "dopri5", "midpoint", "rk4", "heun2", "heun3"),
    *("bosh3", "dopri8", "fehlberg2", "adaptive_heun", "explicit_adams", "implicit_adams"),
    "fixed_adams",
)

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
"""Methods that choose their own steps within a tolerance. torchdiffeq's `scipy_solver` is left out:
LSODA keeps a matrix of all numbers of a block squared, 137 GB for 32 latents of 4 x 32 x 32."""

CORRECTED = ("implicit_adams", "fixed_adams")
"""Methods of fixed steps that correct each of them until it is within a tolerance."""

SDE_METHODS = ("euler_maruyama", "stochastic_heun")

SAMPLERS = {"flow": (*ODE_METHODS, *SDE_METHODS), "ddpm": ("ddpm", "ddim")}
