"""Model FLOPs, and how many of those that the machine can do are used (MFU)."""

import dataclasses
import statistics
import time

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config.model import ExpertChoiceConfig, ModelConfig, MoEConfig, TopKConfig
from models.build import build_model


def training_flops(config: ModelConfig, batch: int = 8) -> float:
    """Floating-point operations of one image's forward and backward pass, matrix products only.

    Counted on tensors without data; the backward pass costs twice the forward pass. Recomputation
    and a capacity schedule are not counted.
    """
    layer = config.feed_forward
    if isinstance(layer, TopKConfig):
        # As many pairs, but without data-dependent shapes.
        common = {f.name: getattr(layer, f.name) for f in dataclasses.fields(MoEConfig)}
        common["name"] = "expert_choice"
        layer = ExpertChoiceConfig(**common, capacity=layer.top_k)
    # Attention as plain products: not every fused kernel is known to the counter.
    plain = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        model = build_model(dataclasses.replace(config, feed_forward=layer)).train()
        x = torch.empty(batch, config.in_channels, config.input_size, config.input_size)
        labels = torch.zeros(batch, dtype=torch.int64)
        model(x, torch.empty(batch), labels)
    return 3 * counter.get_total_flops() / batch


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
