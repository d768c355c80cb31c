"""Fixed positions of the tokens."""

import torch
from torch import Tensor


def sincos_2d(hidden_size: int, grid_size: int) -> Tensor:
    """The 2-D sine-cosine table of DiT.

    The first half of the channels encodes the column, the second half the row; each half holds
    sines, then cosines, of the index times 10000^(-i / (hidden_size / 4)).

    Args:
        hidden_size: width of the table, divisible by 4.
        grid_size: tokens along each side.

    Returns:
        (grid_size**2, hidden_size) float32 in row-major order, computed in float64.
    """
    quarter = hidden_size // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequency)  # (grid, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D/2)
    columns = axis.repeat(grid_size, 1)
    rows = axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()
