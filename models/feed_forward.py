"""The dense feed-forward layers."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.types import RouterContext, RoutingRecord


def tanh_gelu(x: Tensor) -> Tensor:
    """DiT's activation."""
    return F.gelu(x, approximate="tanh")


class DenseFeedForward(nn.Module):
    """Two linear layers with biases: (B, S, D) -> (B, S, D), and no routing to report.

    Args:
        hidden_size: D.
        intermediate_size: hidden width.
        activation: between the layers.
        dropout: of the hidden features.
    """

    role = "dense FFN"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: Callable[[Tensor], Tensor] = tanh_gelu,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        return self.fc2(self.dropout(self.activation(self.fc1(x)))), None


class SwiGLUFeedForward(nn.Module):
    """silu(x W_gate) * (x W_up) W_down (Shazeer 2020, Eq. 6), with biases if asked for.

    The one with biases is JiT's, whose gate and up are one matrix when they are drawn.
    """

    role = "dense FFN"

    def __init__(
        self, hidden_size: int, intermediate_size: int, bias: bool = False, dropout: float = 0.0
    ):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Gate and up with biases: Xavier-uniform as one matrix of twice the fan-out."""
        if self.gate.bias is not None:
            out, fan_in = self.gate.weight.shape
            bound = (6 / (fan_in + 2 * out)) ** 0.5
            for layer in (self.gate, self.up):
                layer.weight.uniform_(-bound, bound)

    def forward(
        self, x: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x))), None


class Identity(nn.Module):
    """The layer's input in place of a shared expert, as the published DSMoE code has it."""

    def forward(
        self, x: Tensor, context: RouterContext | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        return x, None


def build_mlp(
    kind: str, hidden_size: int, intermediate_size: int, dropout: float = 0.0
) -> nn.Module:
    """The dense layer of a config's `mlp` or `shared_mlp` key."""
    if kind == "identity":
        return Identity()
    if kind in ("swiglu", "swiglu_bias"):
        return SwiGLUFeedForward(hidden_size, intermediate_size, kind == "swiglu_bias", dropout)
    activation = {"gelu": tanh_gelu, "silu": F.silu}[kind]
    return DenseFeedForward(hidden_size, intermediate_size, activation, dropout)
