"""Shorter chains through a subset of the trained steps.

A spec says which steps are kept: "" all of them, "250" so many evenly spaced ones with the first
and the last among them, "10,15,20" so many in each of as many equal sections of the chain, and
"ddim50" so many at a whole-numbered stride from step 0 (Song et al. 2021, Appendix D.2).
"""

import torch
from torch import Tensor

from core.errors import UserError


def kept_timesteps(num_timesteps: int, spec: str) -> list[int]:
    """Original timesteps that `spec` keeps of a chain of `num_timesteps`, ascending.

    Raises:
        UserError: for a spec that cannot be read or that asks for more steps than there are.
    """
    if spec == "":
        return list(range(num_timesteps))
    if spec.startswith("ddim"):
        return _strided(num_timesteps, _count(spec, spec.removeprefix("ddim")))
    counts = [_count(spec, part) for part in spec.split(",")]
    kept: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        # Sections that cannot be equal: the first ones are longer by one.
        size = num_timesteps // len(counts) + (index < num_timesteps % len(counts))
        if count > size:
            raise UserError(f"timestep spec {spec!r}: {count} steps asked of a section of {size}")
        kept += [start + step for step in _spread(size, count)]
        start += size
    return kept


def respaced_betas(betas: Tensor, kept: list[int]) -> Tensor:
    """(len(kept),) float64 variances of the chain through the `kept` steps of `betas` (T,).

    Every kept step has the alpha_bar that it had: beta_i = 1 - alpha_bar_i / alpha_bar_(i-1)
    with the previous kept step (Nichol & Dhariwal 2021, Eq. 19).
    """
    alpha_bar = torch.cumprod(1 - betas.to(torch.float64), dim=0)[kept]
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return 1 - alpha_bar / before


def _count(spec: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(
            f"timestep spec {spec!r}: {text!r} is not a positive number of steps; "
            'known forms: "250", "10,15,20", "ddim50"'
        )
    return int(text)


def _spread(size: int, count: int) -> list[int]:
    """`count` of 0 ... size - 1, evenly spaced from the first to the last; one is the first."""
    stride = (size - 1) / (count - 1) if count > 1 else 0.0
    return [round(index * stride) for index in range(count)]


def _strided(num_timesteps: int, count: int) -> list[int]:
    """0, s, 2s, ... with the smallest whole stride s that gives `count` steps."""
    for stride in range(1, num_timesteps + 1):
        steps = range(0, num_timesteps, stride)
        if len(steps) == count:
            return list(steps)
    raise UserError(
        f'timestep spec "ddim{count}": no whole-numbered stride takes {count} of '
        f'{num_timesteps} steps; "{count}" spaces them evenly'
    )
