"""From a config to a model; which block gets which feed-forward layer is decided here."""

from collections.abc import Callable

from torch import nn

from config.layers import DeepSeekConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.model import ModelConfig
from config.promoe import ProMoEConfig
from config.race import RaceConfig
from models.dit import DiT
from models.feed_forward import build_mlp
from models.moe.capacity import CapacityPredictor
from models.moe.deepseek import DeepSeekRouter
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward
from models.moe.prototypes import PrototypeRouter
from models.moe.race import RaceRouter
from models.moe.routers import ExpertChoiceRouter, TokenChoiceRouter


def build_model(config: ModelConfig) -> DiT:
    """The model that a config describes, freshly initialised from torch's global generator."""

    def feed_forward(block: int) -> nn.Module:
        name = config.feed_forward.name if config.has_experts(block) else "dense"
        return FEED_FORWARDS[name](config, config.dropout_of(block))

    return DiT(config, feed_forward)


def _dense(config: ModelConfig, dropout: float = 0.0) -> nn.Module:
    return build_mlp(config.mlp, config.hidden_size, config.dense_width(), dropout)


def _token_choice(config: ModelConfig, dropout: float = 0.0) -> MoEFeedForward:
    layer: TokenChoiceConfig = config.feed_forward
    return moe_layer(config, TokenChoiceRouter(config.router_width(), layer), dropout)


def _deepseek(config: ModelConfig, dropout: float = 0.0) -> MoEFeedForward:
    layer: DeepSeekConfig = config.feed_forward
    return moe_layer(config, DeepSeekRouter(config.router_width(), layer), dropout)


def _promoe(config: ModelConfig, dropout: float = 0.0) -> MoEFeedForward:
    layer: ProMoEConfig = config.feed_forward
    return moe_layer(config, PrototypeRouter(config.router_width(), layer), dropout)


def _expert_choice(config: ModelConfig, dropout: float = 0.0) -> MoEFeedForward:
    layer: ExpertChoiceConfig = config.feed_forward
    predictor = None
    if layer.capacity_predictor:
        predictor = CapacityPredictor(
            config.router_width(), layer.num_experts, layer.threshold_decay, config.hidden_size
        )
    return moe_layer(config, ExpertChoiceRouter(config.router_width(), layer, predictor), dropout)


def _race(config: ModelConfig, dropout: float = 0.0) -> MoEFeedForward:
    layer: RaceConfig = config.feed_forward
    target = config.patch_size**2 * config.in_channels
    router = RaceRouter(config.router_width(), config.hidden_size, layer, target)
    return moe_layer(config, router, dropout)


def moe_layer(config: ModelConfig, router: nn.Module, dropout: float) -> MoEFeedForward:
    """The layer around `router`, with experts as `config.feed_forward` has them."""
    layer, D = config.feed_forward, config.hidden_size
    experts = Experts(
        layer.all_experts(),
        D,
        config.expert_width(),
        layer.expert_mlp or config.mlp,
        config.expert_backend,
        dropout,
    )
    shared = None
    if layer.shared_mlp != "none":
        shared = build_mlp(layer.shared_mlp, D, layer.shared_intermediate_size, dropout)
    per_token = layer.experts_per_token()
    return MoEFeedForward(router, experts, per_token, shared, layer.router_input)


FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    "dense": _dense,
    "token_choice": _token_choice,
    "expert_choice": _expert_choice,
    "diffmoe": _expert_choice,  # the same layer: pool of the batch, with a predictor
    "deepseek": _deepseek,
    "race": _race,
    "promoe": _promoe,
}
"""One line for each feed-forward layer, which takes the model's config and the block's dropout;
its options are the dataclass of that name in `config.schema.FEED_FORWARDS`."""
