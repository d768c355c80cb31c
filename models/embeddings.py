"""Embeddings of the noise level, of the class, and of patches through a bottleneck."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.precision import outside_autocast

FREQUENCIES = 256


def timestep_features(t: Tensor, num_features: int = FREQUENCIES) -> Tensor:
    """Sinusoidal features of the time, used as it is: 0 ... 999 for DDPM, [0, 1] for flow.

    Args:
        t: (B,) times.
        num_features: number of features.

    Returns:
        (B, num_features): cosines, then sines, of t * 10000^(-i / (num_features // 2)); an odd
        one out is 0.
    """
    half = num_features // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) * index / half)
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, num_features % 2))


class TimestepEmbedder(nn.Module):
    """Features of the time through an MLP: (B,) -> (B, D), never under autocast.

    Args:
        hidden_size: D.
        scale: factor of the time before its features are taken.
        reverse: take 1 - t for t: how much noise there is, where 1 is data.
    """

    role = "time embedding"

    def __init__(self, hidden_size: int, scale: float = 1.0, reverse: bool = False):
        super().__init__()
        self.scale, self.reverse = scale, reverse
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        t = self.scale * (1 - t if self.reverse else t)
        with outside_autocast(t.device):
            return self.mlp(timestep_features(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class and one, the last, for "no class": (B,) int64 -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.null_class = num_classes
        self.table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.table(labels)


class BottleneckPatchEmbed(nn.Module):
    """JiT's patch embedding: (B, C, H, W) -> (B, S, D) by way of a narrow layer.

    Args:
        patch_size: side of a patch.
        in_channels: C.
        bottleneck_size: width between the two linear layers, of which the first has no bias.
        hidden_size: D.
    """

    def __init__(self, patch_size: int, in_channels: int, bottleneck_size: int, hidden_size: int):
        super().__init__()
        self.reduce = nn.Conv2d(
            in_channels, bottleneck_size, patch_size, stride=patch_size, bias=False
        )
        self.expand = nn.Linear(bottleneck_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.reduce(x).flatten(2).transpose(1, 2))


class ClassTokens(nn.Module):
    """Tokens of the class that join those of the image (JiT): label vector plus position.

    Args:
        num_tokens: how many, K.
        hidden_size: D.
    """

    def __init__(self, num_tokens: int, hidden_size: int):
        super().__init__()
        self.positions = nn.Parameter(torch.empty(num_tokens, hidden_size))
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """Tokens `x` (B, S, D) with those of `label` (B, D) before them: (B, K + S, D)."""
        return torch.cat([(label[:, None] + self.positions).to(x.dtype), x], dim=1)
