"""What a run can choose about its model: the backbone, and one of the feed-forward layers."""

from dataclasses import dataclass, field
from typing import Literal

from config.layers import MLP, DenseConfig, DiffMoEConfig, MoEConfig

FeedForwardConfig = DenseConfig | MoEConfig
"""All layers with experts have options that extend MoEConfig's; config.schema lists them."""


@dataclass
class ModelConfig:
    """The DiT backbone.

    Attributes:
        input_size: side of the square input: in latent pixels (image side / VAE factor), or in
            pixels where data.vae_path is null.
        in_channels: channels of the latent, or 3 of an image.
        patch_size: side of one patch, in the same units.
        hidden_size: width D of the tokens.
        depth: number of blocks.
        num_heads: attention heads; divides hidden_size.
        head_dim: width of an attention head; by default hidden_size / num_heads.
        num_kv_heads: heads of keys and values, each shared by as many of queries (grouped-query
            attention); by default num_heads.
        qk_norm: normalise queries and keys of each head, by RMSNorm with weights or LayerNorm with
            weights and biases; `true` and `false` of older files are rmsnorm and none.
        qk_norm_eps: added to the variance by that LayerNorm.
        time_scale: factor of the time before it is embedded: 1000 in ProMoE, else 1.
        time_reversed: embed 1 - t instead of t, so that 0 is data and 1 is noise, as ProMoE and
            DiT-MoE count the times of a flow.
        norm: normalisation before attention and feed-forward layers, LayerNorm without or RMSNorm
            with weights.
        final_norm: the same before the output layer.
        positions: DiT's 2-D `sincos` table added to the tokens, or `none`.
        rope: rotary positions of queries and keys: along the row-major index (1d), or half of a
            head by row and half by column (2d).
        bottleneck_size: width between the two layers of JiT's patch embedding; by default it is
            one layer.
        context_tokens: tokens of the class that join those of the image (JiT).
        context_start: block before which they join.
        mlp: kind of the dense layers, and of experts that name no other.
        mlp_ratio: hidden width of a dense layer or expert, in units of hidden_size.
        intermediate_size: the same as a number, where it is no such multiple.
        dropout: of the hidden features of feed-forward layers and of the output of attention, in
            the middle half of the blocks, as JiT has it.
        num_classes: labels are 0 ... num_classes - 1; the null class is num_classes. 0 trains
            without labels.
        label_dropout: probability of training a sample without its label and caption, for
            guidance; where there are both, also without its label alone.
        text_hidden_size: width of the text encoder whose output the blocks attend to; by default
            the model takes no text.
        text_max_length: tokens of a text, to which shorter ones are filled up; the text cache
            must have been made with it.
        text_refiner: transformer blocks over the tokens of the text, before the others see them.
        text_pooling: `mean` also adds the mean of the text's tokens, through an MLP, to the time
            embedding.
        learn_sigma: twice the output channels, for a learned variance; by default what the
            objective needs (ddpm: true, flow: false).
        moe_every: every n-th block (2: the second, fourth, ...; 1: all) has the configured
            feed-forward layer, the others a dense one.
        leading_dense: so many blocks at the beginning have a dense one in any case.
        expert_backend: how experts compute: `bmm` (equal counts), `loop` (one by one),
            `grouped_mm` (any counts in one kernel), or what is fastest on the device.
        feed_forward: the feed-forward layer.
    """

    input_size: int = 32
    in_channels: int = 4
    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    head_dim: int | None = None
    num_kv_heads: int | None = None
    qk_norm: Literal["none", "rmsnorm", "layernorm"] | bool = "none"
    qk_norm_eps: float = 1e-5
    time_scale: float = 1.0
    time_reversed: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    final_norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    positions: Literal["sincos", "none"] = "sincos"
    rope: Literal["none", "1d", "2d"] = "none"
    bottleneck_size: int | None = None
    context_tokens: int = 0
    context_start: int = 0
    mlp: MLP = "gelu"
    mlp_ratio: float = 4.0
    intermediate_size: int | None = None
    dropout: float = 0.0
    num_classes: int = 1000
    label_dropout: float = 0.1
    text_hidden_size: int | None = None
    text_max_length: int = 120
    text_refiner: int = 0
    text_pooling: Literal["mean", "none"] = "mean"
    learn_sigma: bool | None = None
    moe_every: int = 2
    leading_dense: int = 0
    expert_backend: Literal["auto", "loop", "bmm", "grouped_mm"] = "auto"
    feed_forward: FeedForwardConfig = field(default_factory=DiffMoEConfig)

    def __post_init__(self):
        if isinstance(self.qk_norm, bool):
            self.qk_norm = "rmsnorm" if self.qk_norm else "none"

    def dense_width(self) -> int:
        """Hidden width of a dense layer."""
        return self.intermediate_size or int(self.hidden_size * self.mlp_ratio)

    def expert_width(self) -> int:
        """Hidden width of an expert."""
        layer = self.feed_forward
        return layer.intermediate_size or self.dense_width() // layer.hidden_split

    def router_width(self) -> int:
        """Width of what a router reads."""
        decoupled = self.feed_forward.router_input == "decoupled"
        return 2 * self.hidden_size if decoupled else self.hidden_size

    def has_experts(self, block: int) -> bool:
        """Whether block number `block` has the configured layer instead of a dense one."""
        return (block + 1) % self.moe_every == 0 and block >= self.leading_dense

    def dropout_of(self, block: int) -> float:
        """Dropout in block number `block`."""
        quarter = self.depth // 4
        return self.dropout if quarter <= block < 3 * quarter else 0.0

    def moe_blocks(self) -> list[int]:
        """Numbers of the blocks with experts."""
        if isinstance(self.feed_forward, DenseConfig):
            return []
        return [block for block in range(self.depth) if self.has_experts(block)]
