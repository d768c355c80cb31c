"""Self-attention over the tokens of one sample."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.norms import HeadNorm
from models.positions import Rotation, rotate


class Attention(nn.Module):
    """Multi-head self-attention with biases: (B, S, D) -> (B, S, D).

    Args:
        hidden_size: D.
        num_heads: of queries.
        head_dim: width of a head; hidden_size / num_heads unless given.
        num_kv_heads: of keys and values; fewer than `num_heads` are shared (Ainslie et al. 2023).
        head_norm: makes the norms of each head's queries and keys.
        dropout: of the output.
    """

    role = "attention"

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_norm: HeadNorm = nn.Identity,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim or hidden_size // num_heads
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv = nn.Linear(hidden_size, heads * self.head_dim)
        self.q_norm = head_norm(self.head_dim)
        self.k_norm = head_norm(self.head_dim)
        self.proj = nn.Linear(self.num_heads * self.head_dim, hidden_size)
        self.dropout = nn.Dropout(dropout)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Where keys are shared: queries, keys and values Xavier-uniform each for itself."""
        if self.num_kv_heads < self.num_heads:
            kv = self.num_kv_heads * self.head_dim
            for part in self.qkv.weight.split([self.num_heads * self.head_dim, kv, kv]):
                nn.init.xavier_uniform_(part)

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention among `x` (B, S, D), whose positions turn queries and keys by `rotation`.

        `mask` (B, 1, 1, S) says which of them are there.
        """
        B, S, _ = x.shape
        qkv = self.qkv(x).view(B, S, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = self.q_norm(q), self.k_norm(k)  # (B, heads, S, head_dim)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        grouped = self.num_kv_heads < self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.dropout(self.proj(y.transpose(1, 2).flatten(2)))
