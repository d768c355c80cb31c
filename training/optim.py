"""The optimizer, its learning rate, and its state by parameter name."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from config.schema import Config, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters (Appendix B.1); fused, which can skip a step on the device.

    The learning rate is set before every step.
    """
    return torch.optim.AdamW(
        model.parameters(),
        lr=0.0 if config.lr is None else config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a function of it, so nothing to save."""
    optim = config.optim
    peak = optim.peak_lr(config.train.global_batch_size)
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    if optim.lr_schedule == "constant":
        return peak * warmup
    rest = max(0, step - optim.warmup_steps) / max(1, config.train.max_steps - optim.warmup_steps)
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * rest))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `<parameter>/<entry>`."""
    return {
        f"{name}/{entry}": value.detach()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    fill: Callable[[dict[str, Tensor]], None],
) -> None:
    """Put back what `optimizer_tensors` gave; hyperparameters stay those of the config.

    Args:
        model: whose parameters the optimizer has, sharded or not.
        optimizer: an AdamW, fresh or not.
        fill: writes into tensors named as `optimizer_tensors` names them.
    """
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    fill(optimizer_tensors(model, optimizer))
