"""Transformer blocks with adaptive layer norm (adaLN-Zero, Peebles & Xie 2023, Sec. 3.2)."""

from dataclasses import replace

from torch import Tensor, nn

from core.precision import outside_autocast
from core.types import RouterContext, RoutingRecord
from models.norms import build_norm
from models.positions import Rotation
from models.text import Text


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, S, D) scaled by 1 + scale and shifted, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Sequential):
    """Shifts, scales and gates (B, D) from the condition c (B, D).

    Never under autocast: 1 + scale rounded to bf16 is off by thirteen times what scale is.

    Args:
        hidden_size: D.
        count: how many.
    """

    role = "adaLN"

    def __init__(self, hidden_size: int, count: int):
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, count * hidden_size))
        self.count = count

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        with outside_autocast(c.device):
            return super().forward(c.to(self[1].weight.dtype)).chunk(self.count, dim=1)


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, each modulated and gated by the condition.

    Between them, in models of text, attention to the text's tokens, neither modulated nor gated.

    Args:
        hidden_size: D.
        attention: (B, S, D), rotation of positions or None -> (B, S, D).
        feed_forward: (B, S, D), RouterContext -> ((B, S, D), RoutingRecord or None).
        norm: kind of normalisation before each.
        cross: (B, S, D), text -> (B, S, D), or None.
    """

    role = "norm"

    def __init__(
        self,
        hidden_size: int,
        attention: nn.Module,
        feed_forward: nn.Module,
        norm: str = "layernorm",
        cross: nn.Module | None = None,
    ):
        super().__init__()
        self.norm1 = build_norm(norm, hidden_size)
        self.attn = attention
        self.norm_cross = None if cross is None else build_norm(norm, hidden_size)
        self.cross = cross
        self.norm2 = build_norm(norm, hidden_size)
        self.feed_forward = feed_forward
        self.modulation = Modulation(hidden_size, 6)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        rotation: Rotation | None = None,
        context: RouterContext | None = None,
        text: Text | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """x (B, S, D) under the condition c (B, D); `context` is what the model knows."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rotation)
        if self.cross is not None:
            x = x + self.cross(self.norm_cross(x), text)
        tokens = self.norm2(x)
        known = RouterContext() if context is None else context
        context = replace(known, condition=c, tokens=tokens)
        y, record = self.feed_forward(modulate(tokens, shift2, scale2), context)
        return x + gate2[:, None] * y, record


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches: (B, S, D) -> (B, S, patch_features)."""

    role = "output"

    def __init__(self, hidden_size: int, patch_features: int, norm: str = "layernorm"):
        super().__init__()
        self.norm = build_norm(norm, hidden_size)
        self.linear = nn.Linear(hidden_size, patch_features)
        self.modulation = Modulation(hidden_size, 2)
        self.modulation.role = "final adaLN"

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c)
        return self.linear(modulate(self.norm(x), shift, scale))
