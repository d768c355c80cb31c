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


def rotary_2d(head_dim: int, grid_size: int) -> Tensor:
    """Angles of rotary positions on a grid: half of a head turns by row, half by column.

    Args:
        head_dim: width of an attention head, divisible by 4.
        grid_size: tokens along each side.

    Returns:
        (grid_size**2, 2, head_dim / 4): row and column.
    """
    axis = _angles(torch.arange(grid_size), head_dim // 4)  # (grid, head_dim / 4)
    rows = axis.repeat_interleave(grid_size, dim=0)
    columns = axis.repeat(grid_size, 1)
    return torch.stack([rows, columns], dim=1)


def after_context(angles: Tensor, num_context: int) -> Tensor:
    """Angles (S, A, F) with those of `num_context` tokens before them, which are not turned."""
    return torch.cat([angles.new_zeros(num_context, *angles.shape[1:]), angles])


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (S, A, head_dim / (2 A)) of the angles of S tokens along A axes."""


def rotation_of(angles: Tensor) -> Rotation:
    """What `rotate` takes, of the angles (S, A, F)."""
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of channels of queries or keys.

    The head falls into A equal parts, one for each axis; channel i of a part's first half and
    channel i of its second half are a pair. Computed in float32, whatever `x` is.

    Args:
        x: (..., S, head_dim).
        rotation: of the tokens.
    """
    cos, sin = rotation
    first, second = x.unflatten(-1, (cos.shape[1], 2, -1)).unbind(-2)  # (..., S, A, F) each
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, dim=-2).flatten(-3).to(x.dtype)


def _angles(index: Tensor, count: int) -> Tensor:
    """(len(index), count): index times 10000^(-i / count)."""
    return torch.outer(index.float(), BASE ** (-torch.arange(count, dtype=torch.float32) / count))
