"""Algorithm 3 of the DiffMoE paper, run as it is printed: the baseline of the benchmark."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Algorithm3(nn.Module):
    """Batch-level pool, capacity predictor, and a loop that reads and writes rows by index.

    Args:
        hidden_size: D.
        num_experts: N.
        intermediate_size: hidden width of an expert.
        capacity: C.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, intermediate_size: int, capacity: float = 1.0
    ):
        super().__init__()
        self.num_experts, self.capacity = num_experts, capacity
        self.router = nn.Parameter(torch.randn(hidden_size, num_experts) / hidden_size**0.5)
        self.capacity_predictor = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, num_experts)
        )
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden_size, intermediate_size),
                nn.GELU(approximate="tanh"),
                nn.Linear(intermediate_size, hidden_size),
            )
            for _ in range(num_experts)
        )
        self.register_buffer("threshold", torch.zeros(num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> (B, S, D), and the capacity predictor's loss (Eq. 12)."""
        shape = x.shape
        x = x.view(-1, shape[-1])  # (S, d), the pool of the batch
        capacity_pred = self.capacity_predictor(x.detach())
        k = int((len(x) / self.num_experts) * self.capacity)
        scores = torch.einsum("sd,de->se", x, self.router).softmax(dim=-1).permute(-1, -2)
        gating, index = scores.topk(k, dim=-1, sorted=False)  # (e, c)
        y, ones = torch.zeros_like(x), torch.zeros_like(scores)  # (s, d), (e, s)
        for i, expert in enumerate(self.experts):
            rows = index[i]
            y[rows, :] = y[rows, :] + gating[i].unsqueeze(-1) * expert(x[rows, :])
            ones[i][rows] = 1
        if self.training:
            self._update_threshold(capacity_pred, k)
        loss = F.binary_cross_entropy_with_logits(capacity_pred, ones.permute(1, 0))
        return y.view(shape), loss

    @torch.no_grad()
    def _update_threshold(self, capacity_pred: Tensor, k: int) -> None:
        """Eq. 17."""
        kth = capacity_pred.sigmoid().topk(k, dim=0).values[-1]
        self.threshold.mul_(0.95).add_(0.05 * kth)
