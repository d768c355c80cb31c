"""Combinations that cannot work, found before any model is built or data is read."""

import math

from config.layers import MoEConfig
from config.objective import SAMPLERS, SDE_METHODS, DDPMConfig, FlowConfig, SamplingConfig
from config.schema import Config, OptimConfig
from config.validate_data import check_data
from config.validate_model import check_model, least_parameters, require
from core.limits import host_memory


def validate(config: Config, world_size: int | None = 1) -> None:
    """Check a config across its sections.

    Args:
        config: with every default filled in.
        world_size: processes that will train; None if nothing will be trained.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    _check_ranges(config)
    _check_optim(config.optim, config.train.global_batch_size)
    check_data(config)
    check_model(config.model, config.train.micro_batch_size)
    _check_batch(config, world_size or 1)
    _check_parallel(config, world_size)
    _check_sampling(config)


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forward passes of each process in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * world_size)


def fitting_micro_batch(config: Config, world_size: int) -> int:
    """The largest micro-batch up to the config's with which the processes share a step evenly.

    Args:
        config: whose global_batch_size `world_size` divides.
        world_size: processes.
    """
    share = config.train.global_batch_size // world_size
    return next(
        n for n in range(min(config.train.micro_batch_size, share), 0, -1) if share % n == 0
    )


def _check_ranges(config: Config) -> None:
    data, optim, train = config.data, config.optim, config.train
    at_least = {
        "data.image_size": (data.image_size, 1),
        "data.shuffle_window": (data.shuffle_window, 1),
        "data.num_workers": (data.num_workers, 0),
        "optim.lr": (optim.lr or 0, 0),
        "optim.base_lr": (optim.base_lr or 0, 0),
        "optim.warmup_steps": (optim.warmup_steps, 0),
        "optim.ema_every": (optim.ema_every, 1),
        "optim.weight_decay": (optim.weight_decay, 0),
        "train.max_steps": (train.max_steps, 1),
        "train.global_batch_size": (train.global_batch_size, 1),
        "train.micro_batch_size": (train.micro_batch_size, 1),
        "train.log_every": (train.log_every, 1),
        "train.ckpt_every": (train.ckpt_every, 1),
        "train.sample_every": (train.sample_every, 0),
        "train.num_grid_samples": (train.num_grid_samples, 1),
        "train.keep_last": (train.keep_last, 0),
        "train.keep_every": (train.keep_every, 0),
        "train.val_every": (train.val_every, 0),
        "train.num_val_samples": (train.num_val_samples, 1),
        "train.timeout": (train.timeout, 1),
        "train.max_nonfinite_steps": (train.max_nonfinite_steps, 1),
        "evaluation.every": (config.evaluation.every, 0),
        "evaluation.num_samples": (config.evaluation.num_samples, 2),
        "evaluation.batch_size": (config.evaluation.batch_size, 1),
        "sampling.num_steps": (config.sampling.num_steps, 1),
        "sampling.cfg_scale": (config.sampling.cfg_scale, 0),
    }
    for key, (value, least) in at_least.items():
        require(value >= least, f"{key}: {value} is too small; at least {least} is allowed")
    if train.profile_steps is not None:
        first, last = train.profile_steps
        require(
            0 <= first <= last < train.max_steps,
            f"train.profile_steps: {[first, last]} are no first and last step of 0 ... "
            f"{train.max_steps - 1}",
        )
    held_out_images = data.source == "images" and data.val_data_path is not None
    require(
        not train.val_every or data.val_cached_path is not None or held_out_images,
        f"train.val_every: {train.val_every} needs data.val_cached_path, held-out latents, or for "
        "source images data.val_data_path",
    )
    require(
        not config.evaluation.every or config.evaluation.reference is not None,
        f"evaluation.every: {config.evaluation.every} needs evaluation.reference, an .npz",
    )


def _check_optim(optim: OptimConfig, batch: int) -> None:
    fractions = {
        "optim.ema_decay": optim.ema_decay,
        "optim.betas": max(optim.betas),
    } | {f"optim.extra_ema_decays {decay}": decay for decay in optim.extra_ema_decays}
    for key, value in fractions.items():
        require(0 <= value < 1, f"{key}: {value} is not in [0, 1)")
    named = [f"{decay:g}" for decay in optim.extra_ema_decays]  # as their files are
    require(
        len(set(named)) == len(named),
        f"optim.extra_ema_decays: {optim.extra_ema_decays} has the same decay twice",
    )
    clip = optim.grad_clip
    require(clip is None or clip > 0, f"optim.grad_clip: {clip} must be above 0")
    if optim.lr is None or optim.base_lr is None:
        return
    scaled = optim.base_lr * batch / 256
    require(
        math.isclose(scaled, optim.lr),
        f"optim.lr: {optim.lr} is not optim.base_lr {optim.base_lr} x train.global_batch_size "
        f"{batch} / 256 = {scaled:g}; give one of them, and null for the other",
    )


def _check_batch(config: Config, world_size: int) -> None:
    """Whether the processes share a step evenly.

    Where routing does not see the batch, the trainer takes a smaller micro-batch by itself.
    """
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    together, layer = micro * world_size, config.model.feed_forward
    multiple = max(1, round(total / together)) * together
    require(
        total % world_size == 0,
        f"train.global_batch_size: {total} images cannot be shared by {world_size} processes; add "
        f"--train.global_batch_size {multiple}",
    )
    fitting = fitting_micro_batch(config, world_size)
    share = total // world_size
    require(
        2 * fitting > min(micro, share) or layer.pools_batch(),
        f"train.global_batch_size: {total} images over {world_size} process(es) leave "
        f"micro-batches of {fitting}, far below train.micro_batch_size {micro}; add "
        f"--train.global_batch_size {multiple}",
    )
    tokens = fitting * (config.model.input_size // config.model.patch_size) ** 2
    require(
        fitting == micro or not layer.pools_batch(),
        f"train.micro_batch_size: {micro} images x {world_size} process(es) do not divide "
        f"train.global_batch_size {total}; add --train.micro_batch_size {fitting}, which makes the "
        f"{layer.name} layer's pool {fitting} images ({tokens} tokens), or "
        f"--train.global_batch_size {multiple}, which keeps it",
    )


def _check_parallel(config: Config, world_size: int | None) -> None:
    if config.parallel.expert_parallel:
        _check_expert_parallel(config, world_size)
    ahead = config.parallel.prefetch
    require(ahead >= 0, f"parallel.prefetch: {ahead} is negative; allowed: 0 or more")
    if config.parallel.reduce_dtype == "bf16" and config.parallel.strategy != "ddp":
        forwards = 1 if world_size is None else accumulation_steps(config, world_size)
        require(
            forwards == 1,
            f"parallel.reduce_dtype: bf16 under {config.parallel.strategy} would add up the "
            f"{forwards} micro-batches of a step in bf16 too; allowed: one micro-batch a step, "
            "parallel.strategy ddp, or fp32",
        )
    size = config.parallel.shard_size
    if size is None or config.parallel.strategy == "ddp":
        return
    require(
        size >= 1 and (world_size is None or world_size % size == 0),
        f"parallel.shard_size: {size} does not divide {world_size} process(es)",
    )


def _check_expert_parallel(config: Config, world_size: int | None) -> None:
    at, layer = "parallel.expert_parallel", config.model.feed_forward
    require(not config.train.compile, f"{at}: does not go with train.compile")
    require(
        config.parallel.shard_size is None,
        f"{at}: spreads experts over all processes; it does not go with parallel.shard_size",
    )
    experts = layer.all_experts() if isinstance(layer, MoEConfig) else 0
    require(
        world_size is None or experts % world_size == 0,
        f"{at}: the {experts} experts of a layer do not fall into {world_size} equal parts; "
        "allowed: a number of processes that divides them",
    )


def check_memory(config: Config, world_size: int) -> None:
    """Refuse weights that this machine cannot hold, before they fill it.

    Args:
        config: of a run that begins here.
        world_size: processes that train.

    Raises:
        ConfigError: naming what makes the model so large.
    """
    shares = 1 if config.parallel.strategy == "ddp" else world_size
    least = 4 * least_parameters(config.model) / shares  # float32
    memory = host_memory()
    require(
        least <= memory,
        f"model.hidden_size: {config.model.hidden_size} with model.depth {config.model.depth} and "
        f"its experts takes more than {least / 2**30:.0f} GiB for the weights alone; this machine "
        f"has {memory / 2**30:.0f} GiB",
    )


def _check_sampling(config: Config) -> None:
    known = SAMPLERS[config.objective.name]
    require(
        config.sampling.sampler in known,
        f"sampling.sampler: {config.sampling.sampler!r} does not belong to objective.name "
        f"{config.objective.name}; known there: {', '.join(known)}",
    )
    _check_interval(config)
    if isinstance(config.objective, FlowConfig):
        _check_flow(config.objective, config.sampling)
    if isinstance(config.objective, DDPMConfig):
        require(
            config.sampling.num_steps <= config.objective.num_timesteps,
            f"sampling.num_steps: {config.sampling.num_steps} is more than "
            f"objective.num_timesteps {config.objective.num_timesteps}",
        )
        for key, plain in (("time_reversed", False), ("time_scale", 1.0)):
            value = getattr(config.model, key)
            require(
                value == plain,
                f"model.{key}: {value} is for flows; the steps of ddpm are embedded as they are, "
                f"allowed: {plain}",
            )
        eta = config.sampling.ddim_eta
        require(0 <= eta <= 1, f"sampling.ddim_eta: {eta} is not in [0, 1]")


def _check_interval(config: Config) -> None:
    if config.sampling.cfg_interval is None:
        return
    low, high = config.sampling.cfg_interval
    require(
        low < high,
        f"sampling.cfg_interval: {(low, high)} is empty; the first time must be below the second",
    )
    if isinstance(config.objective, DDPMConfig):
        last = config.objective.num_timesteps - 1
        first = 0 if low == 0 else math.floor(low) + 1  # the first step above
        reached, times = first < high and first <= last, f"the steps 0 ... {last}"
    else:
        reached, times = low < 1 and high > 0, "times from 0 to 1"
    require(
        reached,
        f"sampling.cfg_interval: {(low, high)} has none of {times}; nothing would be guided",
    )


def _check_flow(flow: FlowConfig, sampling: SamplingConfig) -> None:
    require(
        flow.prediction != "velocity" or flow.loss_weighting == "none",
        f"objective.loss_weighting: {flow.loss_weighting!r} means nothing for a predicted "
        "velocity; allowed: none, or objective.prediction noise, score or x",
    )
    for key in ("train_eps", "sample_eps"):
        eps = getattr(flow, key)
        require(eps is None or 0 <= eps < 0.5, f"objective.{key}: {eps} is not in [0, 0.5)")
    require(0 < flow.t_eps < 1, f"objective.t_eps: {flow.t_eps} is not in (0, 1)")
    require(flow.time_std > 0, f"objective.time_std: {flow.time_std} must be above 0")
    require(flow.time_shift > 0, f"objective.time_shift: {flow.time_shift} must be above 0")
    shift, mode = sampling.time_shift, flow.time_mode_scale
    require(shift > 0, f"sampling.time_shift: {shift} must be above 0")
    require(
        -1 <= mode <= 2 / (math.pi - 2), f"objective.time_mode_scale: {mode} is not in [-1, 1.75]"
    )
    require(flow.noise_scale > 0, f"objective.noise_scale: {flow.noise_scale} must be above 0")
    scaled = flow.noise_scale != 1
    require(
        not scaled
        or (flow.prediction in ("velocity", "x") and sampling.sampler not in SDE_METHODS),
        f"objective.noise_scale: {flow.noise_scale} fits a predicted velocity or x and ODE "
        f"samplers only, not {flow.prediction} and {sampling.sampler}",
    )
    size = sampling.last_step_size
    require(0 < size < 1, f"sampling.last_step_size: {size} is not in (0, 1)")
    require(
        sampling.diffusion_norm >= 0,
        f"sampling.diffusion_norm: {sampling.diffusion_norm} is negative",
    )
    require(
        sampling.sampler not in SDE_METHODS
        or sampling.last_step == "none"
        or sampling.num_steps > 1,
        f"sampling.num_steps: {sampling.num_steps} is too small for {sampling.sampler} with a last "
        "step; at least 2 is allowed",
    )
