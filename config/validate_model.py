"""Models that cannot work, found before any is built."""

from config.layers import (
    DeepSeekConfig,
    ExpertChoiceConfig,
    MoEConfig,
    TokenChoiceConfig,
)
from config.model import ModelConfig
from config.promoe import ProMoEConfig
from config.race import RaceConfig
from core.errors import ConfigError

AT = "model.feed_forward"


def require(holds: bool, message: str) -> None:
    """Refuse a config with `message` unless the condition holds."""
    if not holds:
        raise ConfigError(message)


MOST_PARAMETERS = 10**12
"""More than any machine holds: beyond it a size is mistyped."""


def check_model(model: ModelConfig, micro_batch_size: int) -> None:
    """Check the section `model`; the batch limits what experts can choose from."""
    _check_ranges(model)
    count = least_parameters(model)
    require(
        count <= MOST_PARAMETERS,
        f"model.hidden_size: {model.hidden_size} with model.depth {model.depth} makes more than "
        f"{count:.2g} parameters; at most {MOST_PARAMETERS:.0e} are allowed",
    )
    _check_attention(model)
    _check_tokens(model)
    _check_pattern(model)
    layer = model.feed_forward
    tokens = (model.input_size // model.patch_size) ** 2
    if isinstance(layer, MoEConfig):
        _check_widths(model, layer)
    if isinstance(layer, ExpertChoiceConfig):
        _check_expert_choice(layer, tokens * (micro_batch_size if layer.pool == "batch" else 1))
    if isinstance(layer, TokenChoiceConfig | DeepSeekConfig | ProMoEConfig | RaceConfig):
        _check_top_k(layer, tokens * micro_batch_size)
    if isinstance(layer, ProMoEConfig):
        _check_prototypes(layer)
    if isinstance(layer, DeepSeekConfig):
        _check_groups(layer)
    if isinstance(layer, RaceConfig):
        _check_race(layer)


def least_parameters(model: ModelConfig) -> int:
    """So many parameters a model has at least: modulation, dense layers and experts."""
    D, layer = model.hidden_size, model.feed_forward
    modulation = 6 * D * D * model.depth
    if modulation > MOST_PARAMETERS:  # nor need its blocks be counted one by one
        return modulation
    experts = len(model.moe_blocks())
    dense = 2 * D * model.dense_width() * (model.depth - experts)
    if isinstance(layer, MoEConfig):
        dense += 2 * D * model.expert_width() * layer.all_experts() * experts
    return modulation + dense


def _check_ranges(model: ModelConfig) -> None:
    least = {
        **dict.fromkeys(("input_size", "in_channels", "patch_size", "hidden_size", "depth"), 1),
        **dict.fromkeys(("num_heads", "head_dim", "num_kv_heads", "bottleneck_size"), 1),
        **dict.fromkeys(("intermediate_size", "moe_every"), 1),
        **dict.fromkeys(("text_hidden_size", "text_max_length"), 1),
        "text_refiner": 0,
        **dict.fromkeys(("num_classes", "context_tokens", "context_start", "leading_dense"), 0),
    }
    for key, low in least.items():
        value = getattr(model, key)
        require(
            value is None or value >= low,
            f"model.{key}: {value} is too small; at least {low} is allowed",
        )
    for key in ("label_dropout", "dropout"):
        value = getattr(model, key)
        require(0 <= value < 1, f"model.{key}: {value} is not in [0, 1)")
    for key in ("qk_norm_eps", "time_scale"):
        value = getattr(model, key)
        require(value > 0, f"model.{key}: {value} must be above 0")
    require(model.mlp_ratio > 0, f"model.mlp_ratio: {model.mlp_ratio} must be above 0")
    split, width = getattr(model.feed_forward, "hidden_split", 1), model.dense_width()
    require(
        split >= 1 and width % split == 0,
        f"{AT}.hidden_split: {split} does not divide {width}, the hidden width of the dense layers",
    )


def _check_attention(model: ModelConfig) -> None:
    require(
        model.hidden_size % model.num_heads == 0 or model.head_dim is not None,
        f"model.hidden_size: {model.hidden_size} is not divisible by "
        f"model.num_heads {model.num_heads}",
    )
    require(
        model.num_kv_heads is None or model.num_heads % model.num_kv_heads == 0,
        f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads "
        f"{model.num_heads}",
    )
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    parts = {"none": 1, "1d": 2, "2d": 4}[model.rope]
    require(
        head_dim % parts == 0,
        f"model.rope: {model.rope} needs heads of a width divisible by {parts}, not {head_dim}",
    )


def _check_tokens(model: ModelConfig) -> None:
    require(
        model.hidden_size % 4 == 0 or model.positions == "none",
        f"model.hidden_size: {model.hidden_size} is not divisible by 4, as the 2-D sine-cosine "
        "positions need",
    )
    require(
        model.input_size % model.patch_size == 0,
        f"model.patch_size: {model.patch_size} does not divide model.input_size {model.input_size}",
    )
    require(
        model.positions != "none" or model.rope != "none",
        "model.positions: none with model.rope none leaves the tokens without a place; allowed: "
        "sincos, or model.rope 1d or 2d",
    )
    require(
        not model.context_tokens or model.context_start < model.depth,
        f"model.context_start: {model.context_start} is not a block; model.depth is {model.depth}",
    )


def _check_pattern(model: ModelConfig) -> None:
    if model.feed_forward.name == "dense":
        return
    require(
        model.moe_every <= model.depth,
        f"model.moe_every: {model.moe_every} is larger than model.depth {model.depth}, so that no "
        f"block would have the {model.feed_forward.name} layer",
    )
    require(
        bool(model.moe_blocks()),
        f"model.leading_dense: {model.leading_dense} leaves no block to the "
        f"{model.feed_forward.name} layer; model.depth is {model.depth}, model.moe_every "
        f"{model.moe_every}",
    )


def _check_widths(model: ModelConfig, layer: MoEConfig) -> None:
    require(layer.num_experts >= 1, f"{AT}.num_experts: {layer.num_experts} is too small")
    require(
        layer.intermediate_size is None or layer.intermediate_size >= 1,
        f"{AT}.intermediate_size: {layer.intermediate_size} is too small; at least 1 is allowed",
    )
    widths = model.hidden_size, model.expert_width()
    require(
        model.expert_backend != "grouped_mm" or all(width % 8 == 0 for width in widths),
        f"model.expert_backend: grouped_mm wants widths in multiples of 8; model.hidden_size and "
        f"the experts' width are {widths[0]} and {widths[1]}",
    )
    shared = layer.shared_intermediate_size
    without = layer.shared_mlp in ("none", "identity")
    require(
        shared == 0 if without else shared > 0,
        f"{AT}.shared_intermediate_size: {shared} does not fit "
        f"shared_mlp {layer.shared_mlp!r}; allowed: 0 for 'none' and 'identity', above 0 otherwise",
    )


def _check_top_k(
    layer: TokenChoiceConfig | DeepSeekConfig | ProMoEConfig | RaceConfig, tokens: int
) -> None:
    require(
        1 <= layer.top_k <= layer.num_experts,
        f"{AT}.top_k: {layer.top_k} is not in 1 ... num_experts ({layer.num_experts})",
    )
    require(
        layer.num_experts <= tokens,
        f"{AT}.num_experts: {layer.num_experts} is more than the {tokens} tokens of a micro-batch",
    )
    for key in ("balance_loss_weight", "contrastive_loss_weight"):
        weight = getattr(layer, key, 0)
        require(weight >= 0, f"{AT}.{key}: {weight} is negative")


def _check_prototypes(layer: ProMoEConfig) -> None:
    heat = layer.contrastive_temperature
    require(heat > 0, f"{AT}.contrastive_temperature: {heat} must be above 0")
    require(
        layer.choice == "token" or layer.balance_loss_weight == 0,
        f"{AT}.balance_loss_weight: {layer.balance_loss_weight} means nothing where experts choose "
        "and all take as many tokens; allowed: 0, or choice token",
    )


def _check_groups(layer: DeepSeekConfig) -> None:
    groups, chosen = layer.num_groups, layer.top_k_groups
    require(
        groups >= 1 and layer.num_experts % groups == 0,
        f"{AT}.num_groups: {groups} does not divide num_experts {layer.num_experts}",
    )
    require(
        1 <= chosen <= groups,
        f"{AT}.top_k_groups: {chosen} is not in 1 ... num_groups ({groups})",
    )
    within = layer.num_experts // groups * chosen
    require(
        layer.top_k <= within,
        f"{AT}.top_k: {layer.top_k} is more than the {within} experts of {chosen} group(s)",
    )
    require(
        layer.routed_scaling_factor > 0,
        f"{AT}.routed_scaling_factor: {layer.routed_scaling_factor} must be above 0",
    )
    require(
        layer.bias_update_rate >= 0,
        f"{AT}.bias_update_rate: {layer.bias_update_rate} is negative",
    )


def _check_race(layer: RaceConfig) -> None:
    require(
        0 <= layer.threshold_decay < 1,
        f"{AT}.threshold_decay: {layer.threshold_decay} is not in [0, 1)",
    )
    for key in ("similarity_loss_weight", "plr_loss_weight"):
        weight = getattr(layer, key)
        require(weight >= 0, f"{AT}.{key}: {weight} is negative")


def _check_expert_choice(layer: ExpertChoiceConfig, pool: int) -> None:
    require(
        1 <= layer.num_experts <= pool,
        f"{AT}.num_experts: {layer.num_experts} is not in 1 ... {pool}, the tokens in the "
        f"pool of a {layer.pool}",
    )
    require(
        0 < layer.capacity <= layer.num_experts,
        f"{AT}.capacity: {layer.capacity} is not in (0, num_experts = {layer.num_experts}]",
    )
    require(
        0 <= layer.threshold_decay < 1,
        f"{AT}.threshold_decay: {layer.threshold_decay} is not in [0, 1)",
    )
    require(
        layer.capacity_predictor or layer.inference == "topk",
        f"{AT}.inference: {layer.inference!r} needs {AT}.capacity_predictor true; allowed "
        "without: topk",
    )
    require(
        layer.inference_capacity is None
        or (layer.inference == "topk" and 0 < layer.inference_capacity <= layer.num_experts),
        f"{AT}.inference_capacity: {layer.inference_capacity} is not allowed; it belongs to "
        f"inference 'topk' and lies in (0, num_experts = {layer.num_experts}]",
    )
    require(
        0 <= layer.fixed_threshold <= 1,
        f"{AT}.fixed_threshold: {layer.fixed_threshold} is not in [0, 1]",
    )
    require(layer.route_scale > 0, f"{AT}.route_scale: {layer.route_scale} must be above 0")
    first, second = layer.capacity_schedule or (0, 1)
    require(
        0 <= first < second,
        f"{AT}.capacity_schedule: {layer.capacity_schedule} is not two rising steps",
    )
