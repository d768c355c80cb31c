"""What float32 means on a GPU: TF32 matrix products, or exact ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions on GPUs use TF32 from now on, or not."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def exact_float32() -> Iterator[None]:
    """No TF32 within the block, whatever the process allows elsewhere."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def outside_autocast(device: torch.device) -> torch.autocast:
    """A block that computes in the precision of its inputs, for what bf16 would hurt."""
    return torch.autocast(device.type, enabled=False)
