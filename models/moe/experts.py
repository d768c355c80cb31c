"""Expert MLPs as stacked weights, computed from a routing plan."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.types import RoutingPlan
from models.moe.dispatch import (
    GatheredProduct,
    Places,
    SegmentedProduct,
    batched_product,
    gather,
)
from models.moe.exchange import own_part

Bias = Tensor | None
ALIGNMENT = 16
"""Bytes in whose multiples `grouped_mm` wants the rows of its operands."""


class Experts(nn.Module):
    """E copies of a dense feed-forward layer in one tensor per weight.

    Weights lie as (E, in, out), so that a batched product reads each expert's slice as it is.
    `gelu`, `silu` and `swiglu_bias` experts have biases b1 (E, H) and b2 (E, D), `swiglu` experts
    none; the first weight (E, D, 2 H) and bias (E, 2 H) of a SwiGLU hold gate, then up.

    Args:
        num_experts: E.
        hidden_size: D.
        intermediate_size: H.
        mlp: `gelu`, `silu`, `swiglu` or `swiglu_bias`.
        backend: `bmm` is one batched product, for equal counts; `loop` goes expert by expert, as
            the pseudo-code of Algorithms 1-4 does; `grouped_mm` is one kernel for any counts.
            `auto` takes bmm where counts are equal, else what is fastest on the device.
        dropout: of the hidden features.
    """

    role = "routed experts"

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        mlp: str = "gelu",
        backend: str = "auto",
        dropout: float = 0.0,
    ):
        super().__init__()
        E, D, H = num_experts, hidden_size, intermediate_size
        self.mlp, self.backend, self.dropout = mlp, backend, dropout
        first = 2 * H if mlp.startswith("swiglu") else H
        self.w1 = nn.Parameter(torch.empty(E, D, first))
        self.w2 = nn.Parameter(torch.empty(E, H, D))
        biased = mlp != "swiglu"
        self.b1 = nn.Parameter(torch.empty(E, first)) if biased else None
        self.b2 = nn.Parameter(torch.empty(E, D)) if biased else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each expert starts as a dense layer of its kind does: Xavier-uniform, zero biases.

        `nn.init.xavier_uniform_` on the whole tensor would take the other experts for fan-in.
        JiT's SwiGLU with biases draws gate and up as one matrix, of twice the fan-out.
        """
        _, H, D = self.w2.shape
        fan_out = 2 * H if self.mlp == "swiglu_bias" else H
        for weight, fans in ((self.w1, D + fan_out), (self.w2, H + D)):
            bound = math.sqrt(6 / fans)
            weight.uniform_(-bound, bound)
        if self.b1 is not None:
            self.b1.zero_()
            self.b2.zero_()

    def forward(self, tokens: Tensor, plan: RoutingPlan, places: Places, first: int = 0) -> Tensor:
        """Outputs (N, D) of the experts for their tokens, sorted by expert.

        Args:
            tokens: (T, D).
            plan: which of them go to whom.
            places: of the plan.
            first: number of the plan's first expert, where it is of some experts only.
        """
        x = tokens.to(product_dtype(tokens))  # before they are gathered: half the memory in bf16
        weights = [own_part(w) for w in (self.w1, self.b1, self.w2, self.b2)]
        count = len(plan.tokens_per_expert)
        if count < len(weights[0]):
            weights = [None if w is None else w[first : first + count] for w in weights]
        backend = self._backend(x, plan)
        if backend == "bmm":
            return self._batched(x, plan, places, *weights)
        rows = gather(x, plan, places)
        if backend == "grouped_mm":
            return self._grouped(rows, plan, *weights)
        return self._loop(rows, plan.host_sizes(), *weights)

    def _backend(self, x: Tensor, plan: RoutingPlan) -> str:
        """What computes this plan; `bmm` steps aside for `loop` where counts vary."""
        if self.backend in ("loop", "grouped_mm"):
            return self.backend
        if plan.capacity is not None:
            return "bmm"
        if self.backend == "bmm":
            return "loop"
        fits = all(w * product_dtype(x).itemsize % ALIGNMENT == 0 for w in self.w2.shape[1:])
        # A compiled graph cannot wait for the counts. On CPUs the kernel is a loop, and a slow one.
        wanted = x.is_cuda and product_dtype(x) == torch.bfloat16
        return "grouped_mm" if fits and (wanted or torch.compiler.is_compiling()) else "loop"

    def _batched(self, x: Tensor, plan: RoutingPlan, places: Places, *weights: Bias) -> Tensor:
        """Equal counts: one batched product for all experts, no look at the device."""
        w1, b1, w2, b2 = (None if w is None else w.to(x.dtype) for w in weights)
        if torch.compiler.is_compiling():  # it decides for itself what is kept
            h = batched_product(gather(x, plan, places).view(len(w1), -1, x.shape[1]), w1, b1)
        else:
            h = GatheredProduct.apply(x, plan.token_index, *places, w1, b1)  # (E, K, H or 2 H)
        return batched_product(self.activate(h), w2, b2).flatten(0, 1)

    def _loop(
        self, x: Tensor, sizes: list[int], w1: Tensor, b1: Bias, w2: Tensor, b2: Bias
    ) -> Tensor:
        """Counts that vary, down to none: one expert after the other."""
        w1, b1, w2, b2 = (None if w is None else w.to(x.dtype) for w in (w1, b1, w2, b2))
        h = self.activate(SegmentedProduct.apply(x, sizes, w1, b1))
        return SegmentedProduct.apply(h, sizes, w2, b2)

    def _grouped(
        self, x: Tensor, plan: RoutingPlan, w1: Tensor, b1: Bias, w2: Tensor, b2: Bias
    ) -> Tensor:
        """Counts that vary, known to the device only."""
        offsets = plan.tokens_per_expert.cumsum(0).to(torch.int32)
        dtype = product_dtype(x)  # the kernel takes no notice of autocast on CPUs
        expert = None if b1 is None else plan.expert_of_pair()

        def product(x: Tensor, weight: Tensor, bias: Bias) -> Tensor:
            y = F.grouped_mm(x.to(dtype), weight.to(dtype), offs=offsets)
            return y if bias is None else y + bias.to(dtype).index_select(0, expert)

        return product(self.activate(product(x, w1, b1)), w2, b2)

    def activate(self, h: Tensor) -> Tensor:
        """Hidden features (..., H) of the first product's outputs (..., H or 2 H)."""
        if self.mlp == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.mlp == "silu":
            h = F.silu(h)
        else:
            gate, up = h.chunk(2, dim=-1)
            h = F.silu(gate) * up
        return F.dropout(h, self.dropout, self.training) if self.dropout else h


def product_dtype(x: Tensor) -> torch.dtype:
    """In which matrix products of `x` are computed."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
