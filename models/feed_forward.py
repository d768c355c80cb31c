"""The dense feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from core.types import RoutingRecord


class DenseFeedForward(nn.Module):
    """DiT's MLP with tanh-GELU: (B, S, D) -> (B, S, D), and no routing to report."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingRecord | None]:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh")), None


class SwiGLUFeedForward(nn.Module):
    """silu(x W_gate) * (x W_up) W_down without biases (Shazeer 2020, Eq. 6)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, RoutingRecord | None]:
        return self.down(F.silu(self.gate(x)) * self.up(x)), None


DENSE = {"gelu": DenseFeedForward, "swiglu": SwiGLUFeedForward}
"""The MLP of a config's `mlp` or `shared_mlp` key."""
