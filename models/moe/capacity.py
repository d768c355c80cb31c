"""How many tokens an expert needs: the capacity predictor and its dynamic thresholds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.precision import outside_autocast
from core.types import RoutingRecord


class SiluLinear(torch.autograd.Function):
    """silu(x) W^T + b in the precision of W; of silu(x) nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.silu(x).to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        active = F.silu(x).to(weight.dtype)
        of_x = torch.ops.aten.silu_backward((grad @ weight).to(x.dtype), x)
        return of_x, grad.mT @ active, grad.sum(dim=0)


class CapacityPredictor(nn.Module):
    """A two-layer MLP (Eq. 10) that learns which tokens each expert takes.

    The thresholds tau (E,) belong to the model's state. The forward never writes them: the
    trainer does, once per step, from the quantiles that the layers report (Eq. 17).

    Args:
        input_size: width of what the router reads.
        num_experts: E.
        threshold_decay: alpha of Eq. 17.
        hidden_size: width between the layers; by default `input_size`.
    """

    role = "predictor"
    state_name = "thresholds"
    thresholds: Tensor

    def __init__(
        self,
        input_size: int,
        num_experts: int,
        threshold_decay: float,
        hidden_size: int | None = None,
    ):
        super().__init__()
        width = hidden_size or input_size
        self.threshold_decay = threshold_decay
        self.mlp = nn.Sequential(
            nn.Linear(input_size, width),
            nn.SiLU(),
            nn.Linear(width, num_experts),
        )
        self.register_buffer("thresholds", torch.zeros(num_experts))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (T, E) float32 for `tokens` (T, input_size), through which no gradient flows back.

        The last product is float32 under autocast too: thresholds are quantiles of its values,
        of which bf16 would make many equal.
        """
        first, _, last = self.mlp
        hidden = first(tokens.detach())
        with outside_autocast(tokens.device):
            return SiluLinear.apply(hidden, last.weight, last.bias).float()

    def counts(self, logits: Tensor, threshold: float | None = None) -> Tensor:
        """Tokens above a threshold, by default the dynamic ones (Eq. 14).

        Args:
            logits: (..., T, E).
            threshold: the same for all experts.

        Returns:
            (..., E) int64.
        """
        limit = self.thresholds if threshold is None else threshold
        return (logits.sigmoid() > limit).sum(dim=-2)

    @property
    def state(self) -> Tensor:
        """What the trainer writes: the thresholds."""
        return self.thresholds

    def row(self, record: RoutingRecord) -> Tensor:
        """(E,) quantiles of a step."""
        return record.quantiles.float()

    def next_state(self, quantiles: Tensor) -> Tensor:
        """Thresholds after one step of Eq. 17 towards `quantiles` (E,)."""
        return self.thresholds.lerp(quantiles.to(self.thresholds), 1 - self.threshold_decay)


def quantile_of_kth(logits: Tensor, k: int) -> Tensor:
    """The k-th largest prediction of each expert: logits (T, E) -> (E,) in [0, 1], detached.

    An expert that takes no token (k = 0) gets 1, which no prediction exceeds.
    """
    T, E = logits.shape
    if k == 0:
        return logits.new_ones(E)
    return logits.detach().kthvalue(T - k + 1, dim=0).values.sigmoid()
