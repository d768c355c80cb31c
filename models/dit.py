"""The diffusion transformer: DiT, DSMoE and JiT are configs of it, with any feed-forward layer."""

from collections.abc import Callable
from dataclasses import replace

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config.model import ModelConfig
from core.conditions import Condition
from core.types import ModelOutput, RouterContext, RoutingRecord
from models.attention import Attention
from models.blocks import DiTBlock, FinalLayer
from models.embeddings import BottleneckPatchEmbed, ClassTokens, LabelEmbedder, TimestepEmbedder
from models.norms import head_norm
from models.positions import (
    Rotation,
    after_context,
    rotary_1d,
    rotary_2d,
    rotation_of,
    sincos_2d,
)
from models.text import CrossAttention, Text, TextEmbedder


class DiT(nn.Module):
    """A transformer on patches of a latent or an image, conditioned on time and class or text.

    The block is DiT's (Peebles & Xie 2023). Rotary positions, other norms, shared keys and values
    and leading dense blocks are those of DSMoE; JiT (Li & He 2025) adds a patch embedding through
    a bottleneck and tokens of the class, which join those of the image before block
    `context_start` and leave them before the output layer. Text reaches the blocks by
    cross-attention, and the time embedding by its mean.

    Args:
        config: shape of the model; `learn_sigma` doubles the channels of the prediction.
        feed_forward: makes the feed-forward layer of block i.

    Attributes:
        role: a module with a role names what its parameters are for, down to modules within that
            have another; `parameters_by_role` counts them.
    """

    role = "embedding"

    def __init__(self, config: ModelConfig, feed_forward: Callable[[int], nn.Module]):
        super().__init__()
        D, p = config.hidden_size, config.patch_size
        self.config = config
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        if config.bottleneck_size is None:
            self.patch_embed = PatchEmbed(config.input_size, p, config.in_channels, D)
        else:
            self.patch_embed = BottleneckPatchEmbed(
                p, config.in_channels, config.bottleneck_size, D
            )
        self.time_embed = TimestepEmbedder(D, config.time_scale, config.time_reversed)
        self.label_embed = LabelEmbedder(config.num_classes, D)
        self.class_tokens = ClassTokens(config.context_tokens, D) if config.context_tokens else None
        self.text_embed = _text_embed(config)
        if self.text_embed is not None:  # the empty caption's, which goes with the weights
            shape = config.text_max_length, config.text_hidden_size
            self.register_buffer("null_text", torch.zeros(shape))
            self.register_buffer("null_mask", torch.arange(shape[0]) < 1)
        for name, table in position_tables(config).items():
            self.register_buffer(name, table, persistent=False)
        self.blocks = nn.ModuleList(self._block(i, feed_forward) for i in range(config.depth))
        self.final = FinalLayer(D, p**2 * self.out_channels, config.final_norm)
        self.gradient_checkpointing = False
        self.reset_parameters()

    def _block(self, number: int, feed_forward: Callable[[int], nn.Module]) -> DiTBlock:
        config = self.config
        norms = head_norm(config.qk_norm, config.qk_norm_eps)
        attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            config.num_kv_heads,
            norms,
            config.dropout_of(number),
        )
        cross = None
        if config.text_hidden_size is not None:
            cross = CrossAttention(config.hidden_size, config.num_heads, config.head_dim, norms)
        return DiTBlock(config.hidden_size, attention, feed_forward(number), config.norm, cross)

    @torch.no_grad()
    def fill_tables(self) -> None:
        """Compute the position tables anew, where memory was allocated but not filled."""
        for name, table in position_tables(self.config).items():
            getattr(self, name).copy_(table)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """DiT's initialisation: Xavier-uniform, and every block starts as the identity.

        Where a published model differs, `init_weights` of the module changes its own part.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if hasattr(module, "init_weights"):
                module.init_weights()
        for module in self.patch_embed.modules():
            if isinstance(module, nn.Conv2d):  # a linear layer on patches
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.label_embed.table.weight, std=0.02)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        zero = [block.modulation[1] for block in self.blocks]
        for layer in (*zero, self.final.modulation[1], self.final.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def moe_layers(self) -> list[nn.Module]:
        """The feed-forward layers with experts, in the order of their routing records."""
        return [self.blocks[i].feed_forward for i in self.config.moe_blocks()]

    def parameters_by_role(self) -> dict[str, int]:
        """Number of trainable parameters by the role that the modules name."""
        counts: dict[str, int] = {}
        todo = [(self, self.role)]
        while todo:
            module, role = todo.pop()
            own = sum(p.numel() for p in module.parameters(recurse=False) if p.requires_grad)
            counts[role] = counts.get(role, 0) + own
            todo += [(child, getattr(child, "role", role)) for child in module.children()]
        return {role: count for role, count in counts.items() if count}

    def forward(
        self, x: Tensor, t: Tensor, cond: Condition | Tensor, step: int | None = None
    ) -> ModelOutput:
        """Prediction for noisy latents or images.

        Args:
            x: (B, C, H, W).
            t: (B,) times as the objective counts them.
            cond: of B samples; labels (B,) int64 may stand for themselves.
            step: of the optimizer, in training, for what follows a schedule.
        """
        cond = self._complete(Condition.of(cond), len(x))
        h = self.patch_embed(x).to(x.dtype)  # (B, S, D); autocast leaves the residual stream alone
        if self.config.positions == "sincos":
            h = h + self.positions
        about, text = self.label_embed(cond.labels), None  # (B, D)
        if self.text_embed is not None:
            tokens, pooled = self.text_embed(cond.text, cond.mask)  # (B, L, D), (B, D)
            text = tokens, cond.mask
            about = about if pooled is None else about + pooled
        time = self.time_embed(t)  # (B, D)
        c = time + about
        K, p = self.config.context_tokens, self.config.patch_size
        context = RouterContext(
            capacity=None if step is None else self.config.feed_forward.capacity_at(step),
            time=t,
            unconditional=cond.free,
            time_embedding=time,
            grid=(x.shape[-2] // p, x.shape[-1] // p),
        )
        records = []
        for number, block in enumerate(self.blocks):
            if K and number == self.config.context_start:
                h = self.class_tokens(h, about)  # (B, K + S, D)
                context = replace(context, num_context=K)
            rotation = self._rotation(K - context.num_context)
            h, record = self._run(block, h, c, rotation, context, text)
            if record is not None:
                records.append(record)
        patches = self.final(h[:, K:], c)
        return ModelOutput(self._unpatchify(patches, x.shape[-2:]), records)

    def _rotation(self, first: int) -> Rotation | None:
        """Of all tokens from number `first` on, those of the class being the first."""
        if self.config.rope == "none":
            return None
        return self.rotary_cos[first:], self.rotary_sin[first:]

    def enable_gradient_checkpointing(self) -> None:
        """In training keep the inputs of blocks only, and compute the rest again for gradients."""
        self.gradient_checkpointing = True

    def _run(
        self, block: nn.Module, *inputs: Tensor | Rotation | RouterContext | Text | None
    ) -> tuple[Tensor, RoutingRecord | None]:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def _complete(self, cond: Condition, count: int) -> Condition:
        """The condition with what it leaves open: no class, the empty caption.

        Raises:
            ValueError: it has a text, which this model does not take.
        """
        if cond.text is not None and self.text_embed is None:
            raise ValueError("cond: has a text, but model.text_hidden_size is null")
        device, labels, free = cond.device, cond.labels, cond.free
        if labels is None:
            labels = torch.full((count,), self.label_embed.null_class, device=device)
        if free is None:
            free = torch.zeros(count, dtype=torch.bool, device=device)
        conditioned = self.config.num_classes > 0 or self.text_embed is not None
        if conditioned and cond.text is None:
            free = free | (labels == self.label_embed.null_class)
        text, mask = cond.text, cond.mask
        if text is None and self.text_embed is not None:
            text, mask = self._null_text(count)
        return Condition(labels, text, mask, free)

    def _null_text(self, count: int, dtype: torch.dtype | None = None) -> Text:
        """The empty caption's tokens (B, L, E), and which of them are there."""
        rows = self.null_text.to(dtype or self.null_text.dtype).expand(count, -1, -1)
        return rows, self.null_mask.expand(count, -1)

    @torch.no_grad()
    def set_null_text(self, rows: Tensor) -> None:
        """Take the encoder's output (L0, E) for the empty caption, which stands for no caption."""
        self.null_text.zero_()[: len(rows)] = rows.to(self.null_text)
        self.null_mask.copy_(torch.arange(len(self.null_mask)) < len(rows))

    def null_condition(self, cond: Condition | Tensor) -> Condition:
        """The condition "no class" and the empty caption in place of `cond`, for guidance."""
        cond = Condition.of(cond)
        labels, text, mask = cond.labels, None, None
        if labels is not None:
            labels = torch.full_like(labels, self.label_embed.null_class)
        if cond.text is not None:
            text, mask = self._null_text(len(cond), cond.text.dtype)
        return Condition(labels, text, mask).side(free=True)

    def drop_condition(self, cond: Condition | Tensor, generator: torch.Generator) -> Condition:
        """`cond` with a share `label_dropout` of it replaced by the null condition.

        Where there are label and text, a share of the labels is dropped by itself besides, since
        prompts come without a class.
        """
        cond = Condition.of(cond)

        def chosen() -> Tensor:
            draw = torch.rand(len(cond), generator=generator, device=cond.device)
            return draw < self.config.label_dropout

        dropped = self.null_condition(cond).where(chosen(), cond)
        if cond.labels is None or cond.text is None:
            return dropped
        labels = dropped.labels.masked_fill(chosen(), self.label_embed.null_class)
        return replace(dropped, labels=labels)

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, S, p * p * C), channel fastest, in the order of the tokens."""
        B, C, H, W = images.shape
        p = self.config.patch_size
        grid = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
        return grid.reshape(B, -1, p * p * C)

    def _unpatchify(self, patches: Tensor, size: torch.Size) -> Tensor:
        """(B, S, p * p * C_out), channel fastest, to (B, C_out, H, W)."""
        p, (H, W) = self.config.patch_size, size
        grid = patches.view(-1, H // p, W // p, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, H, W)


def _text_embed(config: ModelConfig) -> TextEmbedder | None:
    if config.text_hidden_size is None:
        return None
    return TextEmbedder(
        config.text_hidden_size,
        config.hidden_size,
        config.num_heads,
        config.text_refiner,
        config.text_pooling,
        head_norm(config.qk_norm, config.qk_norm_eps),
    )


def position_tables(config: ModelConfig) -> dict[str, Tensor]:
    """The fixed tables of a model of `config`, by the names of its buffers."""
    grid, tables = config.input_size // config.patch_size, {}
    if config.positions == "sincos":
        tables["positions"] = sincos_2d(config.hidden_size, grid)
    if config.rope != "none":
        head_dim = config.head_dim or config.hidden_size // config.num_heads
        angles = rotary_1d(head_dim, grid**2) if config.rope == "1d" else rotary_2d(head_dim, grid)
        turns = rotation_of(after_context(angles, config.context_tokens))
        tables["rotary_cos"], tables["rotary_sin"] = turns
    return tables
