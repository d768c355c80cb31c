"""From a config to a model; which block gets which feed-forward layer is decided here."""

from collections.abc import Callable

from torch import nn

from config.schema import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from models.dit import DiT
from models.feed_forward import DenseFeedForward
from models.moe.capacity import CapacityPredictor
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.moe.routers import ExpertChoiceRouter, TokenChoiceRouter


def build_model(config: ModelConfig) -> DiT:
    """The model that a config describes, freshly initialised from torch's global generator."""

    def feed_forward(block: int) -> nn.Module:
        moe = (block + 1) % config.moe_every == 0
        return FEED_FORWARDS[config.feed_forward.name if moe else "dense"](config)

    return DiT(
        input_size=config.input_size,
        in_channels=config.in_channels,
        out_channels=config.in_channels * (2 if config.learn_sigma else 1),
        patch_size=config.patch_size,
        hidden_size=config.hidden_size,
        depth=config.depth,
        num_heads=config.num_heads,
        num_classes=config.num_classes,
        label_dropout=config.label_dropout,
        feed_forward=feed_forward,
    )


def _dense(config: ModelConfig) -> DenseFeedForward:
    return DenseFeedForward(config.hidden_size, _intermediate_size(config))


def _token_choice(config: ModelConfig) -> MoEFeedForward:
    layer: TokenChoiceConfig = config.feed_forward
    router = TokenChoiceRouter(
        config.hidden_size, layer.num_experts, layer.top_k, layer.balance_loss_weight
    )
    return MoEFeedForward(router, _experts(config))


def _expert_choice(config: ModelConfig) -> MoEFeedForward:
    layer: ExpertChoiceConfig = config.feed_forward
    predictor = None
    if layer.capacity_predictor:
        predictor = CapacityPredictor(config.hidden_size, layer.num_experts, layer.threshold_decay)
    router = ExpertChoiceRouter(
        config.hidden_size,
        layer.num_experts,
        layer.capacity,
        layer.pool,
        predictor,
        layer.capacity_loss_weight,
        dynamic=layer.inference == "dynamic",
    )
    return MoEFeedForward(router, _experts(config))


def _experts(config: ModelConfig) -> Experts:
    num_experts = config.feed_forward.num_experts
    return Experts(num_experts, config.hidden_size, _intermediate_size(config))


def _intermediate_size(config: ModelConfig) -> int:
    return int(config.hidden_size * config.mlp_ratio)


FEED_FORWARDS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "dense": _dense,
    "token_choice": _token_choice,
    "expert_choice": _expert_choice,
    "diffmoe": _expert_choice,  # the same layer: pool of the batch, with a predictor
}
"""One line for each feed-forward layer; its options are the dataclass of that name in
`config.schema.FEED_FORWARDS`."""
