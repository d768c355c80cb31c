"""Normalisation of tokens."""

from torch import Tensor, nn

EPS = 1e-6


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + 1e-6) times a weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, size: int):
        super().__init__(size, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size), in the precision of `x`."""
        return super().forward(x.float()).to(x.dtype)


def build_norm(kind: str, hidden_size: int) -> nn.Module:
    """The `norm` of a config: LayerNorm without weights, as DiT has it, or RMSNorm with."""
    if kind == "rmsnorm":
        return RMSNorm(hidden_size)
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPS)
