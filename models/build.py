"""From a config to a model; which block gets which feed-forward layer is decided here."""

from collections.abc import Callable

from torch import nn

from config.schema import ExpertChoiceConfig, ModelConfig, TokenChoiceConfig
from models.dit import DiT
from models.feed_forward import DENSE
from models.moe.capacity import CapacityPredictor
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.moe.routers import ExpertChoiceRouter, TokenChoiceRouter


def build_model(config: ModelConfig) -> DiT:
    """The model that a config describes, freshly initialised from torch's global generator."""

    def feed_forward(block: int) -> nn.Module:
        moe = (block + 1) % config.moe_every == 0
        return FEED_FORWARDS[config.feed_forward.name if moe else "dense"](config)

    return DiT(config, feed_forward)


def _dense(config: ModelConfig) -> nn.Module:
    return DENSE[config.mlp](config.hidden_size, _intermediate_size(config))


def _token_choice(config: ModelConfig) -> MoEFeedForward:
    layer: TokenChoiceConfig = config.feed_forward
    router = TokenChoiceRouter(
        config.hidden_size, layer.num_experts, layer.top_k, layer.balance_loss_weight
    )
    return MoEFeedForward(router, _experts(config), _shared(config))


def _expert_choice(config: ModelConfig) -> MoEFeedForward:
    layer: ExpertChoiceConfig = config.feed_forward
    predictor = None
    if layer.capacity_predictor:
        predictor = CapacityPredictor(config.hidden_size, layer.num_experts, layer.threshold_decay)
    router = ExpertChoiceRouter(config.hidden_size, layer, predictor)
    return MoEFeedForward(router, _experts(config), _shared(config))


def _experts(config: ModelConfig) -> Experts:
    num_experts = config.feed_forward.num_experts
    return Experts(
        num_experts,
        config.hidden_size,
        _intermediate_size(config),
        config.mlp,
        config.expert_backend,
    )


def _shared(config: ModelConfig) -> nn.Module | None:
    layer = config.feed_forward
    if layer.shared_mlp == "none":
        return None
    return DENSE[layer.shared_mlp](config.hidden_size, layer.shared_intermediate_size)


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
