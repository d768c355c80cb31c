"""The diffusion transformer (DiT), class-conditional, with any feed-forward layer."""

from collections.abc import Callable

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from core.types import ModelOutput
from models.blocks import DiTBlock, FinalLayer
from models.embeddings import LabelEmbedder, TimestepEmbedder
from models.positions import sincos_2d


class DiT(nn.Module):
    """A transformer on patches of a latent, conditioned on time and class (Peebles & Xie 2023).

    Args:
        input_size: side of the latent.
        in_channels: channels of the latent, C.
        out_channels: channels of the prediction, C or 2 C.
        patch_size: side of a patch.
        hidden_size: width D.
        depth: number of blocks.
        num_heads: attention heads.
        num_classes: labels are 0 ... num_classes - 1, the null class is num_classes.
        label_dropout: share of labels replaced by the null class in training.
        feed_forward: makes the feed-forward layer of block i.
    """

    positions: Tensor

    def __init__(
        self,
        input_size: int,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        label_dropout: float,
        feed_forward: Callable[[int], nn.Module],
    ):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = out_channels
        self.label_dropout = label_dropout
        self.patch_embed = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.time_embed = TimestepEmbedder(hidden_size)
        self.label_embed = LabelEmbedder(num_classes, hidden_size)
        grid = input_size // patch_size
        self.register_buffer("positions", sincos_2d(hidden_size, grid), persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, feed_forward(i)) for i in range(depth)
        )
        self.final = FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier-uniform, and every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.proj.bias)
        nn.init.normal_(self.label_embed.table.weight, std=0.02)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [block.modulation[1] for block in self.blocks]
        for layer in (*zero, self.final.modulation[1], self.final.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> ModelOutput:
        """Prediction for noisy latents.

        Args:
            x: (B, C, H, W).
            t: (B,) times as the objective counts them.
            cond: (B,) int64 labels.
        """
        h = self.patch_embed(x) + self.positions  # (B, S, D)
        c = self.time_embed(t) + self.label_embed(cond)  # (B, D)
        records = []
        for block in self.blocks:
            h, record = block(h, c)
            if record is not None:
                records.append(record)
        return ModelOutput(self._unpatchify(self.final(h, c), x.shape[-2:]), records)

    def null_condition(self, cond: Tensor) -> Tensor:
        """The condition "no class" in place of `cond` (B,), for guidance."""
        return torch.full_like(cond, self.label_embed.null_class)

    def drop_condition(self, cond: Tensor, generator: torch.Generator) -> Tensor:
        """`cond` (B,) with a share `label_dropout` of it replaced by "no class"."""
        draw = torch.rand(cond.shape, generator=generator, device=cond.device)
        return torch.where(draw < self.label_dropout, self.null_condition(cond), cond)

    def _unpatchify(self, patches: Tensor, size: torch.Size) -> Tensor:
        """(B, S, p * p * C_out), channel fastest, to (B, C_out, H, W)."""
        p, (H, W) = self.patch_size, size
        grid = patches.view(-1, H // p, W // p, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, H, W)
