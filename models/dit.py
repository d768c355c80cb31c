"""The diffusion transformer (DiT), class-conditional, with any feed-forward layer."""

from collections.abc import Callable

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.schema import ModelConfig
from core.types import ModelOutput, RoutingRecord
from models.attention import Attention
from models.blocks import DiTBlock, FinalLayer
from models.embeddings import LabelEmbedder, TimestepEmbedder
from models.positions import sincos_2d


class DiT(nn.Module):
    """A transformer on patches of a latent, conditioned on time and class (Peebles & Xie 2023).

    Args:
        config: shape of the model; `learn_sigma` doubles the channels of the prediction.
        feed_forward: makes the feed-forward layer of block i.
    """

    positions: Tensor

    def __init__(self, config: ModelConfig, feed_forward: Callable[[int], nn.Module]):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.config = config
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.patch_embed = PatchEmbed(config.input_size, p, config.in_channels, D)
        self.time_embed = TimestepEmbedder(D)
        self.label_embed = LabelEmbedder(config.num_classes, D)
        positions = sincos_2d(D, config.input_size // p)
        self.register_buffer("positions", positions, persistent=False)
        self.blocks = nn.ModuleList(
            DiTBlock(D, Attention(D, config.num_heads, config.head_dim), feed_forward(i))
            for i in range(config.depth)
        )
        self.final = FinalLayer(D, p**2 * self.out_channels)
        self.gradient_checkpointing = False
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier-uniform, and every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
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
            h, record = self._run(block, h, c)
            if record is not None:
                records.append(record)
        return ModelOutput(self._unpatchify(self.final(h, c), x.shape[-2:]), records)

    def enable_gradient_checkpointing(self) -> None:
        """In training keep the inputs of blocks only, and compute the rest again for gradients."""
        self.gradient_checkpointing = True

    def _run(self, block: nn.Module, h: Tensor, c: Tensor) -> tuple[Tensor, RoutingRecord | None]:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, h, c, use_reentrant=False)
        return block(h, c)

    def null_condition(self, cond: Tensor) -> Tensor:
        """The condition "no class" in place of `cond` (B,), for guidance."""
        return torch.full_like(cond, self.label_embed.null_class)

    def drop_condition(self, cond: Tensor, generator: torch.Generator) -> Tensor:
        """`cond` (B,) with a share `label_dropout` of it replaced by "no class"."""
        draw = torch.rand(cond.shape, generator=generator, device=cond.device)
        return torch.where(draw < self.config.label_dropout, self.null_condition(cond), cond)

    def _unpatchify(self, patches: Tensor, size: torch.Size) -> Tensor:
        """(B, S, p * p * C_out), channel fastest, to (B, C_out, H, W)."""
        p, (H, W) = self.config.patch_size, size
        grid = patches.view(-1, H // p, W // p, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, H, W)
