"""Every random draw comes from a generator made of a seed, what the draw is for, and indices.

No draw depends on a global state, so that the number of processes, workers or samples in a
batch never changes what one sample gets.
"""

import hashlib
import struct

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed that is a function of (seed, purpose, index) alone."""
    key = struct.pack(f"<{1 + len(index)}q", seed, *index) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def generator(
    seed: int, purpose: str, *index: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """A generator on `device`, seeded by `derive_seed`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, purpose, *index))


class SampleNoise:
    """Noise of a batch of samples, each from a CPU generator of its own.

    Drawing on the CPU makes the noise of sample i the same on every device and in every batch.

    Args:
        generators: one per sample.
        shape: of one sample, (C, H, W).
        device: where the noise is wanted.
    """

    def __init__(
        self,
        generators: list[torch.Generator],
        shape: tuple[int, ...],
        device: str | torch.device = "cpu",
    ):
        self.generators = generators
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """Fresh noise (B, *shape)."""
        draws = [torch.randn(self.shape, generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)
