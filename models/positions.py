"""Fixed positions of the tokens: a table that is added, or rotations of queries and keys."""

import torch
from torch import Tensor

BASE = 10000.0


def sincos_2d(hidden_size: int, grid_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The 2-D sine-cosine table of DiT.

    The first half of the channels encodes the column, the second half the row; each half holds
    sines, then cosines, of the index times 10000^(-i / (hidden_size / 4)).

    Args:
        hidden_size: width of the table, divisible by 4.
        grid_size: tokens along each side.
        dtype: of the result.

    Returns:
        (grid_size**2, hidden_size) in row-major order, computed in float64.
    """
    quarter = hidden_size // 4
    frequency = BASE ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle = torch.outer(torch.arange(grid_size, dtype=torch.float64), frequency)  # (grid, D/4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D/2)
    columns = axis.repeat(grid_size, 1)
    rows = axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).to(dtype)


def rotary_1d(head_dim: int, num_tokens: int) -> Tensor:
    """Angles of rotary positions along the row-major index (Su et al. 2021, Sec. 3.2).

    Args:
        head_dim: width of an attention head, even.
        num_tokens: S.

    Returns:
        (S, 1, head_dim / 2): one axis, an angle for each pair of channels.
    """
    return _angles(torch.arange(num_tokens), head_dim // 2)[:, None]


def rotary_2d(head_dim: int, grid_size: int, num_context: int = 0) -> Tensor:
    """Angles of rotary positions on a grid: half of a head turns by row, half by column.

    Args:
        head_dim: width of an attention head, divisible by 4.
        grid_size: tokens along each side.
        num_context: tokens before those of the grid, which are not turned.

    Returns:
        (num_context + grid_size**2, 2, head_dim / 4): row and column.
    """
    axis = _angles(torch.arange(grid_size), head_dim // 4)  # (grid, head_dim / 4)
    rows = axis.repeat_interleave(grid_size, dim=0)
    columns = axis.repeat(grid_size, 1)
    grid = torch.stack([rows, columns], dim=1)
    return torch.cat([grid.new_zeros(num_context, *grid.shape[1:]), grid])


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of channels of queries or keys.

    Args:
        x: (..., S, head_dim).
        angles: (S, A, head_dim / (2 A)); the head falls into A equal parts, one for each axis.
        interleaved: pairs are neighbours (0, 1), (2, 3) ...; otherwise channel i of a part's
            first half and channel i of its second half.
    """
    parts = x.unflatten(-1, (angles.shape[1], -1))  # (..., S, A, head_dim / A)
    if interleaved:
        first, second = parts[..., 0::2], parts[..., 1::2]
    else:
        first, second = parts.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(turned, dim=-1) if interleaved else torch.cat(turned, dim=-1)
    return joined.flatten(-3) if interleaved else joined.flatten(-2)


def _angles(index: Tensor, count: int) -> Tensor:
    """(len(index), count): index times 10000^(-i / count)."""
    return torch.outer(index.float(), BASE ** (-torch.arange(count, dtype=torch.float32) / count))
