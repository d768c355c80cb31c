"""The path between noise and data.

Time runs as in all published code and checkpoints: t = 0 is noise, t = 1 is data. The DiffMoE
paper writes the same path with its t equal to our 1 - t (Eq. 24-31).
"""

from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Times (B,) shaped to broadcast over `like` (B, ...)."""
    return t.view(-1, *[1] * (like.dim() - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t x + (1 - t) noise (Eq. 24) for data x (B, ...) and times t (B,)."""
    t = expand(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """d x_t / dt = x - noise (Eq. 28), the same at every time."""
    return x - noise
