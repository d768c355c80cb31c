"""Combinations that cannot work, found before any model is built or data is read."""

from config.schema import (
    SAMPLERS,
    SDE_METHODS,
    Config,
    DDPMConfig,
    ExpertChoiceConfig,
    FlowConfig,
    ModelConfig,
    SamplingConfig,
    TokenChoiceConfig,
)
from core.errors import ConfigError


def validate(config: Config, world_size: int | None = 1) -> None:
    """Check a config across its sections.

    Args:
        config: with every default filled in.
        world_size: processes that will train; None if nothing will be trained.

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    _check_ranges(config)
    _check_data(config)
    _check_model(config.model)
    _check_experts(config)
    _check_shared(config.model)
    _check_batch(config, world_size or 1)
    _check_parallel(config, world_size)
    _check_sampling(config)


def accumulation_steps(config: Config, world_size: int) -> int:
    """Forward passes of each process in one optimizer step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * world_size)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_ranges(config: Config) -> None:
    model, data, optim, train = config.model, config.data, config.optim, config.train
    at_least = {
        "model.input_size": (model.input_size, 1),
        "model.in_channels": (model.in_channels, 1),
        "model.patch_size": (model.patch_size, 1),
        "model.hidden_size": (model.hidden_size, 1),
        "model.depth": (model.depth, 1),
        "model.num_heads": (model.num_heads, 1),
        "model.num_classes": (model.num_classes, 0),
        "model.moe_every": (model.moe_every, 1),
        "data.image_size": (data.image_size, 1),
        "data.shuffle_window": (data.shuffle_window, 1),
        "data.num_workers": (data.num_workers, 0),
        "optim.lr": (optim.lr, 0),
        "optim.warmup_steps": (optim.warmup_steps, 0),
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
        _require(value >= least, f"{key}: {value} is too small; at least {least} is allowed")
    fractions = {
        "model.label_dropout": model.label_dropout,
        "optim.ema_decay": optim.ema_decay,
        "optim.betas": max(optim.betas),
    } | {f"optim.extra_ema_decays {decay}": decay for decay in optim.extra_ema_decays}
    for key, value in fractions.items():
        _require(0 <= value < 1, f"{key}: {value} is not in [0, 1)")
    clip = optim.grad_clip
    _require(clip is None or clip > 0, f"optim.grad_clip: {clip} must be above 0")
    _require(
        not train.val_every or data.val_cached_path is not None,
        f"train.val_every: {train.val_every} needs data.val_cached_path, held-out latents",
    )
    _require(
        not config.evaluation.every or config.evaluation.reference is not None,
        f"evaluation.every: {config.evaluation.every} needs evaluation.reference, an .npz",
    )
    _require(model.mlp_ratio > 0, f"model.mlp_ratio: {model.mlp_ratio} must be above 0")


def _check_data(config: Config) -> None:
    data = config.data
    _require(data.cached_path != [], "data.cached_path: names no folder")
    _require(
        data.source != "npz" or data.npz_contents is not None,
        "data.npz_contents: source npz needs it, since the files do not say what they hold: "
        "posterior, scaled_posterior, latent or scaled_latent",
    )
    _require(
        data.source != "images" or data.data_path is not None,
        "data.data_path: source images needs it, a folder DATA_PATH/<class>/<images>",
    )
    _require(
        data.source != "images" or data.order == "random",
        "data.order: shards is for cached latents; source images has random only",
    )
    guided = config.model.num_classes == 0 and config.sampling.cfg_scale != 1
    _require(
        not guided,
        f"sampling.cfg_scale: {config.sampling.cfg_scale} needs classes; with model.num_classes 0 "
        "only 1 is allowed",
    )


def _check_model(model: ModelConfig) -> None:
    _require(
        model.hidden_size % model.num_heads == 0 or model.head_dim is not None,
        f"model.hidden_size: {model.hidden_size} is not divisible by "
        f"model.num_heads {model.num_heads}",
    )
    _require(
        model.hidden_size % 4 == 0,
        f"model.hidden_size: {model.hidden_size} is not divisible by 4, as the 2-D sine-cosine "
        "positions need",
    )
    _require(
        model.input_size % model.patch_size == 0,
        f"model.patch_size: {model.patch_size} does not divide model.input_size {model.input_size}",
    )
    _require(
        model.moe_every <= model.depth or model.feed_forward.name == "dense",
        f"model.moe_every: {model.moe_every} is larger than model.depth {model.depth}, so that no "
        f"block would have the {model.feed_forward.name} layer",
    )
    widths = model.hidden_size, int(model.hidden_size * model.mlp_ratio)
    _require(
        model.expert_backend != "grouped_mm" or all(width % 8 == 0 for width in widths),
        f"model.expert_backend: grouped_mm wants widths in multiples of 8; model.hidden_size and "
        f"the experts' width are {widths[0]} and {widths[1]}",
    )


def _check_experts(config: Config) -> None:
    layer = config.model.feed_forward
    tokens = (config.model.input_size // config.model.patch_size) ** 2
    at = "model.feed_forward"
    if isinstance(layer, TokenChoiceConfig):
        _require(
            1 <= layer.top_k <= layer.num_experts,
            f"{at}.top_k: {layer.top_k} is not in 1 ... num_experts ({layer.num_experts})",
        )
        _require(
            layer.balance_loss_weight >= 0,
            f"{at}.balance_loss_weight: {layer.balance_loss_weight} is negative",
        )
    if isinstance(layer, ExpertChoiceConfig):
        pool = tokens * (config.train.micro_batch_size if layer.pool == "batch" else 1)
        _require(
            1 <= layer.num_experts <= pool,
            f"{at}.num_experts: {layer.num_experts} is not in 1 ... {pool}, the tokens in the "
            f"pool of a {layer.pool}",
        )
        _require(
            0 < layer.capacity <= layer.num_experts,
            f"{at}.capacity: {layer.capacity} is not in (0, num_experts = {layer.num_experts}]",
        )
        _require(
            0 <= layer.threshold_decay < 1,
            f"{at}.threshold_decay: {layer.threshold_decay} is not in [0, 1)",
        )
        _require(
            layer.capacity_predictor or layer.inference == "topk",
            f"{at}.inference: {layer.inference!r} needs {at}.capacity_predictor true; allowed "
            "without: topk",
        )
        _require(
            layer.inference_capacity is None
            or (layer.inference == "topk" and 0 < layer.inference_capacity <= layer.num_experts),
            f"{at}.inference_capacity: {layer.inference_capacity} is not allowed; it belongs to "
            f"inference 'topk' and lies in (0, num_experts = {layer.num_experts}]",
        )
        _require(
            0 <= layer.fixed_threshold <= 1,
            f"{at}.fixed_threshold: {layer.fixed_threshold} is not in [0, 1]",
        )
        first, second = layer.capacity_schedule or (0, 1)
        _require(
            0 <= first < second,
            f"{at}.capacity_schedule: {layer.capacity_schedule} is not two rising steps",
        )
    if isinstance(layer, TokenChoiceConfig):
        _require(
            layer.num_experts <= tokens * config.train.micro_batch_size,
            f"{at}.num_experts: {layer.num_experts} is more than the "
            f"{tokens * config.train.micro_batch_size} tokens of a micro-batch",
        )


def _check_shared(model: ModelConfig) -> None:
    layer, at = model.feed_forward, "model.feed_forward"
    if isinstance(layer, TokenChoiceConfig | ExpertChoiceConfig):
        _require(
            (layer.shared_mlp == "none") == (layer.shared_intermediate_size == 0),
            f"{at}.shared_intermediate_size: {layer.shared_intermediate_size} does not fit "
            f"shared_mlp {layer.shared_mlp!r}; allowed: 0 for 'none', above 0 otherwise",
        )


def _check_batch(config: Config, world_size: int) -> None:
    micro, total = config.train.micro_batch_size, config.train.global_batch_size
    _require(
        total % (micro * world_size) == 0,
        f"train.global_batch_size: {total} is not a multiple of train.micro_batch_size {micro} x "
        f"{world_size} process(es); allowed here: multiples of {micro * world_size}, or a smaller "
        "train.micro_batch_size (which changes the token pool)",
    )


def _check_parallel(config: Config, world_size: int | None) -> None:
    size = config.parallel.shard_size
    if size is None:
        return
    _require(
        config.parallel.strategy == "fsdp",
        f"parallel.shard_size: {size} means nothing for ddp; allowed: parallel.strategy fsdp",
    )
    _require(
        size >= 1 and (world_size is None or world_size % size == 0),
        f"parallel.shard_size: {size} does not divide {world_size} process(es)",
    )


def _check_sampling(config: Config) -> None:
    known = SAMPLERS[config.objective.name]
    _require(
        config.sampling.sampler in known,
        f"sampling.sampler: {config.sampling.sampler!r} does not belong to objective.name "
        f"{config.objective.name}; known there: {', '.join(known)}",
    )
    low, high = config.sampling.cfg_interval or (0, 1)
    _require(
        low < high,
        f"sampling.cfg_interval: {config.sampling.cfg_interval} is empty; the first time must be "
        "below the second",
    )
    if isinstance(config.objective, FlowConfig):
        _check_flow(config.objective, config.sampling)
    if isinstance(config.objective, DDPMConfig):
        _require(
            config.sampling.num_steps <= config.objective.num_timesteps,
            f"sampling.num_steps: {config.sampling.num_steps} is more than "
            f"objective.num_timesteps {config.objective.num_timesteps}",
        )


def _check_flow(flow: FlowConfig, sampling: SamplingConfig) -> None:
    _require(
        flow.prediction != "velocity" or flow.loss_weighting == "none",
        f"objective.loss_weighting: {flow.loss_weighting!r} means nothing for a predicted "
        "velocity; allowed: none, or objective.prediction noise, score or x",
    )
    for key in ("train_eps", "sample_eps"):
        eps = getattr(flow, key)
        _require(eps is None or 0 <= eps < 0.5, f"objective.{key}: {eps} is not in [0, 0.5)")
    size = sampling.last_step_size
    _require(0 < size < 1, f"sampling.last_step_size: {size} is not in (0, 1)")
    _require(
        sampling.diffusion_norm >= 0,
        f"sampling.diffusion_norm: {sampling.diffusion_norm} is negative",
    )
    _require(
        sampling.sampler not in SDE_METHODS
        or sampling.last_step == "none"
        or sampling.num_steps > 1,
        f"sampling.num_steps: {sampling.num_steps} is too small for {sampling.sampler} with a last "
        "step; at least 2 is allowed",
    )
