"""Normalisation of tokens, and of the queries and keys of attention."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) times a weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, size: int):
        super().__init__(size, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size), in the precision of `x`."""
        return super().forward(x.float()).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with weights and biases, computed in their precision."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size), in the precision of `x`."""
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


HeadNorm = Callable[[int], nn.Module]
"""Makes the norm of queries or keys for heads of a width; `nn.Identity` for none."""


def head_norm(kind: str, eps: float) -> HeadNorm:
    """The `qk_norm` of a config, with the `eps` of its LayerNorm."""
    if kind == "layernorm":
        return partial(LayerNorm, eps=eps)
    return RMSNorm if kind == "rmsnorm" else nn.Identity


def build_norm(kind: str, hidden_size: int) -> nn.Module:
    """The `norm` of a config: LayerNorm without weights, as DiT has it, or RMSNorm with."""
    if kind == "rmsnorm":
        return RMSNorm(hidden_size)
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
