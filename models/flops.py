"""FLOPs of a model's forward pass."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.model import ModelConfig
from core.types import RouterContext
from models.build import build_model


class _Stated(nn.Module):
    """In place of a layer that states its own FLOPs, so that none of its code is run."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.per_token, self.flops = layer.flops_per_token(), 0.0

    def forward(self, x: Tensor, context: RouterContext) -> tuple[Tensor, None]:
        self.flops += self.per_token * x.shape[0] * x.shape[1]
        return x, None


def forward_flops(config: ModelConfig) -> float:
    """Floating-point operations of one image's forward pass in training, matrix products only.

    Counted on tensors without data. A layer with `flops_per_token` is taken at its word: routing
    depends on data, which there is none of.
    """
    # Attention as plain products: not every fused kernel is known to the counter.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model = build_model(config)
        stated = []
        for block in model.blocks:
            if hasattr(block.feed_forward, "flops_per_token"):
                stated.append(_Stated(block.feed_forward))
                block.feed_forward = stated[-1]
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        model(x, torch.empty(1), torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops() + sum(layer.flops for layer in stated)
