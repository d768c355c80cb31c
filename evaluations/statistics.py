"""Means and covariances of features that arrive in batches, on one process or many.

Shapes: N rows, D features.
"""

import numpy as np
import torch
from torch import Tensor

from core.distributed import Processes
from core.errors import UserError


class RunningStatistics:
    """Sums of rows and of their outer products in float64.

    Args:
        width: D.
        device: of the sums.
    """

    def __init__(self, width: int, device: str | torch.device = "cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(width, dtype=torch.float64, device=device)
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)

    def update(self, rows: Tensor) -> None:
        """Add rows (N, D)."""
        x = rows.to(self.total)
        self.count += len(x)
        self.total += x.sum(dim=0)
        self.products.addmm_(x.T, x)

    def reduce(self, processes: Processes) -> None:
        """Add up the sums of all processes; each of them gets the result."""
        for part in (self.count, self.total, self.products):
            processes.all_reduce_sum(part)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and unbiased covariance (D, D), float64.

        Raises:
            UserError: fewer than two rows.
        """
        if self.count < 2:
            raise UserError(f"features: statistics need at least 2 rows, got {int(self.count)}")
        mu = self.total / self.count
        sigma = (self.products - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return mu.cpu().numpy(), sigma.cpu().numpy()
