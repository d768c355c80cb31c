"""Model FLOPs, and how many of those that the machine can do are used (MFU)."""

import statistics
import time

import torch

from config.model import ModelConfig
from models.flops import forward_flops


def training_flops(config: ModelConfig) -> float:
    """Floating-point operations of one image's forward and backward pass, matrix products only.

    The backward pass costs twice the forward pass. Recomputation and a capacity schedule are not
    counted.
    """
    return 3 * forward_flops(config)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square matrix product on this machine: median of five."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(seconds[1:])
