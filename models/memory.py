"""Memory that a training's state takes on each process, by arithmetic; activations come on top."""

import torch

from config.schema import Config
from config.validate import accumulation_steps
from models.build import build_model

FLOAT = 4
MOMENTS = 2


def state_per_process(config: Config, processes: int) -> dict[str, float]:
    """Bytes of weights, gradients, AdamW's moments and averages in float32, by strategy.

    Sharded gradients are reduced in the last micro-batch of a step: where there are several, they
    wait for it unsharded; where there is one, those of one block do.

    Args:
        config: of a run.
        processes: that share its work.

    Returns:
        {parallel.strategy: bytes on each process}.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    largest = max(sum(p.numel() for p in block.parameters()) for block in model.blocks)
    averages = 1 + len(config.optim.extra_ema_decays)
    whole = total * (2 + MOMENTS + averages)
    waiting = total if accumulation_steps(config, processes) > 1 else largest
    found = {
        "ddp": whole,
        "zero1": whole / processes + total + waiting,
        "fsdp": whole / processes + largest + waiting,
    }
    return {strategy: FLOAT * numbers for strategy, numbers in found.items()}
