"""How the text of a caption enters the model: projection, refiner, pooling, cross-attention.

Frozen encoders say what the tokens are; what the published text-to-image models do with them is
not written down, so that shapes follow the parameter counts of DiffMoE's paper (config/sizes.py).

Shapes: B samples, S tokens of the image, L of the text, E width of the encoder, D of the model.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from core.precision import outside_autocast
from models.attention import Attention
from models.feed_forward import build_mlp
from models.norms import HeadNorm, RMSNorm

Text = tuple[Tensor, Tensor]
"""Tokens (B, L, D) as blocks see them, and which of them are there (B, L) bool."""


class CrossAttention(nn.Module):
    """Attention from the image's tokens to those of the text: (B, S, D) -> (B, S, D).

    Args:
        hidden_size: D.
        num_heads: of queries, keys and values.
        head_dim: width of a head; hidden_size / num_heads unless given.
        head_norm: makes the norms of each head's queries and keys.
    """

    role = "text"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        head_norm: HeadNorm = nn.Identity,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim or hidden_size // num_heads
        inner = num_heads * self.head_dim
        self.q = nn.Linear(hidden_size, inner)
        self.kv = nn.Linear(hidden_size, 2 * inner)
        self.q_norm = head_norm(self.head_dim)
        self.k_norm = head_norm(self.head_dim)
        self.proj = nn.Linear(inner, hidden_size)

    def init_weights(self) -> None:
        """The block begins as one without text."""
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """Attention of `x` (B, S, D) to the tokens of `text` that are there."""
        tokens, mask = text
        q = self._heads(self.q(x))
        k, v = self._heads(self.kv(tokens)).chunk(2, dim=1)  # (B, heads, L, head_dim) each
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class RefinerBlock(nn.Module):
    """A transformer block over the tokens of a text, in both directions: (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int, head_norm: HeadNorm):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(hidden_size), RMSNorm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, head_norm=head_norm)
        self.attn.role = "text"
        self.mlp = build_mlp("gelu", hidden_size, 4 * hidden_size)
        self.mlp.role = "text"

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`x` (B, L, D), of which `mask` (B, L) says what is there."""
        x = x + self.attn(self.norm1(x), mask=mask[:, None, None])
        return x + self.mlp(self.norm2(x))[0]


class TextEmbedder(nn.Module):
    """What the blocks see of a text, and what the time embedding gets of it.

    Args:
        text_hidden_size: E.
        hidden_size: D.
        num_heads: of the refiner's attention.
        refiner: blocks over the tokens of the text.
        pooling: `mean` also adds the mean of the normalised tokens, through an MLP of its own, to
            the time embedding; `none` does not.
        head_norm: of the refiner's attention.
    """

    role = "text"

    def __init__(
        self,
        text_hidden_size: int,
        hidden_size: int,
        num_heads: int,
        refiner: int = 0,
        pooling: str = "mean",
        head_norm: HeadNorm = nn.Identity,
    ):
        super().__init__()
        self.norm = RMSNorm(text_hidden_size)
        self.proj = _mlp(text_hidden_size, hidden_size)
        self.pool = _mlp(text_hidden_size, hidden_size) if pooling == "mean" else None
        blocks = (RefinerBlock(hidden_size, num_heads, head_norm) for _ in range(refiner))
        self.refiner = nn.ModuleList(blocks)

    def init_weights(self) -> None:
        """Of the pooled text nothing is added at first."""
        if self.pool is not None:
            nn.init.zeros_(self.pool[2].weight)
            nn.init.zeros_(self.pool[2].bias)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) and the pooled text (B, D), or None, of `text` (B, L, E)."""
        rows = self.norm(text.to(self.norm.weight.dtype))
        tokens = self.proj(rows)
        refined = tokens.to(rows.dtype)  # autocast leaves the residual stream alone
        for block in self.refiner:
            refined = block(refined, mask)
        # Rounded once for all blocks, which would each keep a copy of their own.
        tokens = refined.to(tokens.dtype)
        return tokens, None if self.pool is None else self._pooled(rows, mask)

    def _pooled(self, rows: Tensor, mask: Tensor) -> Tensor:
        """(B, D), never under autocast: it is added to the time."""
        there = mask[..., None].to(rows.dtype)
        mean = (rows * there).sum(dim=1) / there.sum(dim=1)
        with outside_autocast(mean.device):
            return self.pool(mean)


def _mlp(text_hidden_size: int, hidden_size: int) -> nn.Sequential:
    first = nn.Linear(text_hidden_size, hidden_size)
    return nn.Sequential(first, nn.GELU("tanh"), nn.Linear(hidden_size, hidden_size))
