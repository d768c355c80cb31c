"""The optimizer, its learning rate, and its state by parameter name."""

import math

import torch
from torch import Tensor, nn

from config.schema import Config, OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters (Appendix B.1)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=next(model.parameters()).is_cuda,
    )


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a function of it, so nothing to save."""
    optim = config.optim
    warmup = min(1.0, (step + 1) / (optim.warmup_steps + 1))
    if optim.lr_schedule == "constant":
        return optim.lr * warmup
    rest = max(0, step - optim.warmup_steps) / max(1, config.train.max_steps - optim.warmup_steps)
    return optim.lr * warmup * 0.5 * (1 + math.cos(math.pi * rest))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts as `<parameter>/<entry>`."""
    return {
        f"{name}/{entry}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave; hyperparameters stay those of the config."""
    index = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit("/", 1)
        state.setdefault(index[name], {})[entry] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
