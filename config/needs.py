"""Which keys need which others to have an effect."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from config.layers import DenseConfig, MoEConfig
from config.objective import ADAPTIVE, CORRECTED, SDE_METHODS
from config.schema import Config


@dataclass(frozen=True)
class Need:
    """What keys need to have an effect.

    Attributes:
        section: of the keys.
        keys: several, separated by spaces.
        met: whether a config has it.
        words: the same for the user.
    """

    section: str
    keys: str
    met: Callable[[Config], bool]
    words: str

    def paths(self) -> list[str]:
        """The keys with their section."""
        return [f"{self.section}.{key}" if self.section else key for key in self.keys.split()]


def _layer(key: str) -> Callable[[Config], Any]:
    return lambda config: getattr(config.model.feed_forward, key, None)


def _objective(key: str, value: object) -> Callable[[Config], bool]:
    return lambda config: getattr(config.objective, key, None) == value


def _blows_up(config: Config) -> bool:
    """Whether the formulas of the flow do, at an end of its path."""
    flow = config.objective
    return getattr(flow, "path", None) == "vp" or flow.prediction not in ("velocity", "x")


BLOWS_UP = "objective.path vp, or objective.prediction noise or score"

NEEDS = (
    Need("", "init_fresh init_upcycle", lambda c: c.init_from is not None, "init_from"),
    Need(
        "",
        "init_upcycle",
        lambda c: not isinstance(c.model.feed_forward, DenseConfig),
        "a model.feed_forward.name other than dense",
    ),
    Need("data", "cached_path", lambda c: c.data.source != "images", "data.source latents or npz"),
    Need("data", "npz_contents", lambda c: c.data.source == "npz", "data.source npz"),
    Need(
        "data",
        "data_path",
        lambda c: c.data.source == "images" or c.data.text_source == "online",
        "data.source images, or data.text_source online",
    ),
    Need(
        "data",
        "text_source text_cached_path val_text_cached_path caption_choice",
        lambda c: c.model.text_hidden_size is not None,
        "model.text_hidden_size",
    ),
    Need(
        "data",
        "text_cached_path",
        lambda c: c.data.text_source == "cached",
        "data.text_source cached",
    ),
    Need(
        "data",
        "captions path_key caption_key caption_template "
        "text_encoder text_layer text_prefix text_dtype",
        lambda c: c.data.text_source == "online",
        "data.text_source online",
    ),
    Need(
        "data", "val_text_cached_path", lambda c: c.train.val_every > 0, "train.val_every above 0"
    ),
    Need("data", "shuffle_window", lambda c: c.data.order == "shards", "data.order shards"),
    Need("data", "val_cached_path", lambda c: c.train.val_every > 0, "train.val_every above 0"),
    Need(
        "data",
        "val_data_path",
        lambda c: (
            c.train.val_every > 0 and c.data.source == "images" and c.data.val_cached_path is None
        ),
        "train.val_every above 0, data.source images, and no data.val_cached_path",
    ),
    Need("train", "num_val_samples", lambda c: c.train.val_every > 0, "train.val_every above 0"),
    Need(
        "train",
        "num_grid_samples",
        lambda c: c.train.sample_every > 0,
        "train.sample_every above 0",
    ),
    Need("train", "keep_every", lambda c: c.train.keep_last > 0, "train.keep_last above 0"),
    Need(
        "parallel",
        "param_dtype",
        lambda c: c.parallel.strategy != "ddp" and c.train.precision == "bf16",
        "parallel.strategy fsdp or zero1, and train.precision bf16",
    ),
    Need(
        "parallel",
        "prefetch",
        lambda c: c.parallel.strategy != "ddp",
        "parallel.strategy fsdp or zero1",
    ),
    Need(
        "parallel",
        "shard_size",
        lambda c: c.parallel.strategy != "ddp",
        "parallel.strategy fsdp or zero1",
    ),
    Need(
        "parallel",
        "expert_parallel",
        lambda c: c.parallel.strategy != "ddp" and isinstance(c.model.feed_forward, MoEConfig),
        "parallel.strategy fsdp or zero1, and a model.feed_forward.name other than dense",
    ),
    Need(
        "evaluation",
        "reference num_samples batch_size features",
        lambda c: c.evaluation.every > 0,
        "evaluation.every above 0",
    ),
    Need(
        "evaluation",
        "inception_weights inception_sha256",
        lambda c: c.evaluation.every > 0 and c.evaluation.features == "inception",
        "evaluation.every above 0 and evaluation.features inception",
    ),
    Need(
        "evaluation",
        "classifier",
        lambda c: c.evaluation.every > 0 and c.evaluation.features == "digits",
        "evaluation.every above 0 and evaluation.features digits",
    ),
    Need(
        "model",
        "moe_every leading_dense expert_backend",
        lambda c: not isinstance(c.model.feed_forward, DenseConfig),
        "a model.feed_forward.name other than dense",
    ),
    Need(
        "model", "qk_norm_eps", lambda c: c.model.qk_norm == "layernorm", "model.qk_norm layernorm"
    ),
    Need("model", "context_start", lambda c: c.model.context_tokens > 0, "model.context_tokens"),
    Need(
        "model",
        "label_dropout",
        lambda c: c.model.num_classes > 0 or c.model.text_hidden_size is not None,
        "model.num_classes above 0, or model.text_hidden_size",
    ),
    Need(
        "model",
        "text_max_length text_refiner text_pooling",
        lambda c: c.model.text_hidden_size is not None,
        "model.text_hidden_size",
    ),
    Need(
        "model",
        "mlp_ratio",
        lambda c: c.model.intermediate_size is None,
        "model.intermediate_size null",
    ),
    Need(
        "model.feed_forward",
        "capacity_loss_weight threshold_decay",
        lambda c: getattr(c.model.feed_forward, "capacity_predictor", True),  # a race needs none
        "model.feed_forward.capacity_predictor true",
    ),
    Need(
        "model.feed_forward",
        "hidden_split",
        lambda c: c.model.feed_forward.intermediate_size is None,
        "model.feed_forward.intermediate_size null",
    ),
    Need(
        "model.feed_forward",
        "fixed_threshold",
        lambda c: _layer("inference")(c) == "fixed",
        "model.feed_forward.inference fixed",
    ),
    Need(
        "model.feed_forward",
        "round_share_first",
        lambda c: c.model.feed_forward.rounding == "down",
        "model.feed_forward.rounding down",
    ),
    Need(
        "model.feed_forward",
        "contrastive_temperature contrastive_top_k",
        _layer("contrastive_loss_weight"),
        "model.feed_forward.contrastive_loss_weight above 0",
    ),
    Need(
        "model.feed_forward",
        "contrastive_top_k",
        lambda c: _layer("choice")(c) == "token",
        "model.feed_forward.choice token",
    ),
    Need(
        "model.feed_forward",
        "balance_per_sample",
        _layer("balance_loss_weight"),
        "model.feed_forward.balance_loss_weight above 0",
    ),
    Need(
        "model.feed_forward",
        "zero_masked_groups",
        lambda c: c.model.feed_forward.top_k_groups < c.model.feed_forward.num_groups,
        "model.feed_forward.top_k_groups below num_groups",
    ),
    Need(
        "objective",
        "time_mean time_std",
        _objective("time_distribution", "logit_normal"),
        "objective.time_distribution logit_normal",
    ),
    Need(
        "objective",
        "time_mode_scale",
        _objective("time_distribution", "mode"),
        "objective.time_distribution mode",
    ),
    Need("objective", "train_eps", _blows_up, BLOWS_UP),
    Need(
        "objective",
        "sample_eps",
        lambda c: _blows_up(c) or c.sampling.sampler in SDE_METHODS,
        f"{BLOWS_UP}, or a sampler of the SDE",
    ),
    Need("objective", "t_eps", _objective("prediction", "x"), "objective.prediction x"),
    Need(
        "objective",
        "variance_type",
        lambda c: not c.model.learn_sigma,
        "model.learn_sigma false",
    ),
    Need(
        "sampling",
        "cfg_interval cfg_channels cfg_pooling",
        lambda c: c.sampling.cfg_scale != 1,
        "a sampling.cfg_scale other than 1",
    ),
    Need(
        "sampling",
        "num_steps",
        lambda c: c.sampling.sampler not in ADAPTIVE,
        "a sampler with fixed steps",
    ),
    Need(
        "sampling",
        "atol rtol",
        lambda c: c.sampling.sampler in (*ADAPTIVE, *CORRECTED),
        f"a sampler with tolerances: {', '.join((*ADAPTIVE, *CORRECTED))}",
    ),
    Need(
        "sampling",
        "overshoot",
        lambda c: c.sampling.sampler in ADAPTIVE,
        "a sampler that chooses its steps, such as dopri5",
    ),
    Need(
        "sampling",
        "time_shift",
        lambda c: c.objective.name == "flow" and c.sampling.sampler not in ADAPTIVE,
        "objective.name flow and a sampler with fixed steps",
    ),
    Need("sampling", "ddim_eta", lambda c: c.sampling.sampler == "ddim", "sampling.sampler ddim"),
    Need("sampling", "clip_denoised", lambda c: c.objective.name == "ddpm", "objective.name ddpm"),
    Need(
        "sampling",
        "diffusion_form diffusion_norm last_step",
        lambda c: c.sampling.sampler in SDE_METHODS,
        f"a sampler of the SDE: {' or '.join(SDE_METHODS)}",
    ),
    Need(
        "sampling",
        "last_step_size",
        lambda c: c.sampling.sampler in SDE_METHODS and c.sampling.last_step != "none",
        "a sampler of the SDE and a sampling.last_step",
    ),
)
