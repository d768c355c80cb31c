"""Everything that a run can choose, as typed dataclasses.

`model.feed_forward` and `objective` have one dataclass per `name`; the tables at the end of the
file say which. A field that is None here is filled in by `config.load` from other choices.
"""

from dataclasses import dataclass, field
from typing import Literal

from config.model import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    ModelConfig,
    TokenChoiceConfig,
)


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
        time_distribution: training times are `uniform`, or sigmoid(N(time_mean, time_std)).
        time_mean: of `logit_normal` times, P_mean of JiT.
        time_std: of `logit_normal` times, P_std of JiT.
        noise_scale: standard deviation of the noise.
    """

    name: Literal["flow"] = "flow"
    path: Literal["linear", "gvp", "vp"] = "linear"
    prediction: Literal["velocity", "noise", "score", "x"] = "velocity"
    loss_weighting: Literal["none", "velocity", "likelihood"] = "none"
    train_eps: float | None = None
    sample_eps: float | None = None
    t_eps: float = 0.05
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    time_mean: float = -0.8
    time_std: float = 0.8
    noise_scale: float = 1.0


@dataclass
class DDPMConfig:
    """Denoising diffusion: noise prediction over discrete steps.

    Attributes:
        name: which objective.
        num_timesteps: steps of the noising process; step 0 is nearest the data.
        noise_schedule: betas over these steps.
    """

    name: Literal["ddpm"] = "ddpm"
    num_timesteps: int = 1000
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"


ObjectiveConfig = FlowConfig | DDPMConfig


@dataclass
class DataConfig:
    """Training data.

    Attributes:
        source: `latents` reads what main_cache.py wrote, `npz` a published cache of one file for
            each image, `images` encodes images while training, or takes them as they are where
            vae_path is null.
        cached_path: folder of latents, or a list of folders that are taken as one.
        npz_contents: what the arrays of a published cache are; see data/published.py. The files
            do not say it.
        data_path: folder of images, for source `images`.
        val_cached_path: folder that main_cache.py wrote of held-out images, for validation losses.
        val_data_path: folder of held-out images themselves, for source `images`.
        vae_path: VAE that decodes samples, a hub id or a local folder; null for models of pixels.
        image_size: side of the images, in pixels; the cache must have been made with it.
        horizontal_flip: take the mirror image's latent half of the time.
        order: `random` in the whole data set, or `shards`: shuffled files, and images shuffled
            within a window of them, for disks that are slow at random places.
        shuffle_window: files in that window.
        num_workers: loader processes for each training process.
    """

    source: Literal["latents", "npz", "images"] = "latents"
    cached_path: list[str] | str = "cache/imagenet256"
    npz_contents: Literal["posterior", "scaled_posterior", "latent", "scaled_latent"] | None = None
    data_path: str | None = None
    val_cached_path: str | None = None
    val_data_path: str | None = None
    vae_path: str | None = "stabilityai/sd-vae-ft-mse"
    image_size: int = 256
    horizontal_flip: bool = True
    order: Literal["random", "shards"] = "random"
    shuffle_window: int = 8
    num_workers: int = 4


@dataclass
class OptimConfig:
    """AdamW.

    Attributes:
        lr: learning rate, which the paper holds constant; by default what base_lr makes it, or
            1e-4.
        base_lr: learning rate for a batch of 256: lr is base_lr x train.global_batch_size / 256.
        lr_schedule: `constant`, or `cosine` down to 0 at train.max_steps.
        warmup_steps: steps over which the learning rate first rises from 0 to lr.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay.
        ema_decay: decay of the averaged weights, per step.
        ema_warmup: start with a shorter average: decay min(ema_decay, (1 + step) / (10 + step)).
        extra_ema_decays: further averages beside the one that is sampled from, kept as
            `ema_<decay>`.
        grad_clip: largest L2 norm of the gradient; by default it is not clipped.
    """

    lr: float | None = None
    base_lr: float | None = None
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    extra_ema_decays: tuple[float, ...] = ()
    grad_clip: float | None = None

    def peak_lr(self, global_batch_size: int) -> float:
        """The learning rate after warm-up."""
        if self.lr is not None:
            return self.lr
        return 1e-4 if self.base_lr is None else self.base_lr * global_batch_size / 256


@dataclass
class TrainConfig:
    """Length of the run, batch, and what is written when.

    Attributes:
        max_steps: optimizer steps.
        global_batch_size: images per optimizer step over all processes.
        micro_batch_size: images per forward pass of one process. It sets the size of DiffMoE's
            token pool and belongs to the experiment; more processes mean fewer accumulation
            steps, never another pool.
        log_every: steps between log entries.
        ckpt_every: steps between checkpoints; one is always written at the end.
        keep_last: newest checkpoints that are kept; 0 keeps all.
        keep_every: checkpoints of steps that this number divides are kept besides; 0 for none.
        sample_every: steps between sample grids from the averaged weights; 0 turns them off.
        num_grid_samples: images in a grid.
        val_every: steps between validation losses on data.val_cached_path; 0 turns them off.
        num_val_samples: images of a validation loss.
        precision: `bf16` computes under autocast; weights, averages and routers stay float32.
        tf32: TF32 matrix products on GPUs: faster, less exact.
        compile: compile the blocks by torch.compile.
        activation_checkpointing: keep the inputs of blocks only, and compute the rest again in
            the backward pass: less memory, about a third more time.
        max_nonfinite_steps: steps with a non-finite loss or gradient are skipped; after so many
            in a row training stops.
        timeout: seconds to wait for data or for another process before training stops.
    """

    max_steps: int = 700_000
    global_batch_size: int = 256
    micro_batch_size: int = 64
    log_every: int = 100
    ckpt_every: int = 50_000
    keep_last: int = 0
    keep_every: int = 0
    sample_every: int = 10_000
    num_grid_samples: int = 16
    val_every: int = 0
    num_val_samples: int = 256
    precision: Literal["fp32", "bf16"] = "fp32"
    tf32: bool = False
    compile: bool = False
    activation_checkpointing: bool = False
    max_nonfinite_steps: int = 10
    timeout: int = 600


@dataclass
class ParallelConfig:
    """How several processes share the work.

    Attributes:
        strategy: `ddp` keeps the whole model on every process; `fsdp` shards weights, averages
            and optimizer state over them.
        shard_size: processes that hold one copy of a sharded model between them, such as the
            GPUs of a node (hybrid sharding); by default all.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    shard_size: int | None = None


@dataclass
class SamplingConfig:
    """How samples are drawn, for grids during training and as sample_ddp.py's defaults.

    Attributes:
        sampler: flow: euler, heun, heun_euler (Heun with a last step of Euler), dopri5 or another
            ODE method of torchdiffeq, or the SDE by euler_maruyama or stochastic_heun; ddpm:
            ddpm, ddim. By default euler or ddpm.
        num_steps: steps of the sampler, the SDE's last step included; adaptive methods such as
            dopri5 choose their own.
        cfg_scale: classifier-free guidance scale; 1 is no guidance.
        cfg_interval: guide only at times low < t < high, as the model counts them; a low of 0
            is no bound. By default always.
        cfg_channels: guide all channels of the latent, or the first 3 as DiT and SiT do.
        cfg_pooling: conditional and unconditional half in `separate` calls, or `joint` in one
            batch, whose tokens a batch-level router then pools.
        atol: absolute tolerance of adaptive methods.
        rtol: relative tolerance of adaptive methods.
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
    cfg_scale: float = 1.0
    cfg_interval: tuple[float, float] | None = None
    cfg_channels: Literal["all", "first3"] = "all"
    cfg_pooling: Literal["separate", "joint"] = "separate"
    atol: float = 1e-6
    rtol: float = 1e-3
    overshoot: bool = False
    diffusion_form: Literal[
        "constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"
    ] = "sigma"
    diffusion_norm: float = 1.0
    last_step: Literal["none", "mean", "tweedie", "euler"] = "mean"
    last_step_size: float = 0.04


@dataclass
class EvaluationConfig:
    """Scores of samples while training; too few samples to compare with a published FID.

    Attributes:
        every: steps between scores of the averaged weights; 0 turns them off.
        reference: `.npz` to compare with, see docs/evaluation.md.
        num_samples: images.
        batch_size: images in a block; routing over the batch depends on it.
        features: network whose features are compared.
        inception_weights: its weight file; downloaded by default.
        inception_sha256: that the file must have; by default that of the published one.
        classifier: weight file of features `digits`.
    """

    every: int = 0
    reference: str | None = None
    num_samples: int = 5000
    batch_size: int = 32
    features: Literal["inception", "digits"] = "inception"
    inception_weights: str | None = None
    inception_sha256: str | None = None
    classifier: str | None = None


@dataclass
class Config:
    """One run.

    Attributes:
        seed: of every random draw.
        device: `auto` takes the GPUs where there are any.
        run_dir: folder for checkpoints, logs and samples; by default runs/<name of the config>.
        resume: `auto` continues from the newest checkpoint of run_dir where there is one;
            `never` refuses to start in a run_dir that has checkpoints, unless torchrun restarted
            the processes after a failure.
        init_from: checkpoint whose averaged weights a new run starts from.
        init_fresh: what keeps its fresh weights then: nothing, the `labels` (another set of
            classes), the `head` (another output), or `both`.
    """

    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str | None = None
    resume: Literal["auto", "never"] = "never"
    init_from: str | None = None
    init_fresh: Literal["nothing", "labels", "head", "both"] = "nothing"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=FlowConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


FEED_FORWARDS = {
    "dense": DenseConfig,
    "token_choice": TokenChoiceConfig,
    "expert_choice": ExpertChoiceConfig,
    "diffmoe": DiffMoEConfig,
    "deepseek": DeepSeekConfig,
}

OBJECTIVES = {"flow": FlowConfig, "ddpm": DDPMConfig}

ODE_METHODS = (
    *("euler", "heun", "heun_euler", "dopri5", "midpoint", "rk4", "heun2", "heun3"),
    *("bosh3", "dopri8", "fehlberg2", "adaptive_heun", "explicit_adams", "implicit_adams"),
    *("fixed_adams", "scipy_solver"),
)
SDE_METHODS = ("euler_maruyama", "stochastic_heun")

SAMPLERS = {"flow": (*ODE_METHODS, *SDE_METHODS), "ddpm": ("ddpm", "ddim")}

CHOICES = {"model.feed_forward": FEED_FORWARDS, "objective": OBJECTIVES}
"""Sections whose dataclass is picked by their `name` key."""
