"""What the routers did in one step, over all processes, for the log."""

from dataclasses import dataclass

import torch
from torch import Tensor

from core.distributed import Processes
from core.types import RoutingRecord
from models.dit import DiT
from training.router_state import keepers
from training.validation import BINS


@dataclass
class RoutingStatistics:
    """Of each of the L MoE layers; everything on the CPU.

    The capacity of a layer with a predictor is the one that its thresholds would give on these
    tokens in dynamic inference (Eq. 14); that of any other is what was computed (Eq. 8).

    Attributes:
        loads: (L, E) tokens of each expert.
        capacity: (L, BINS) mean capacity by noise level, NaN where no sample was.
        mean_capacity: (L,) over all samples.
        accuracy: (L,) share of token-expert pairs where predictor and threshold agree with what
            the expert took; None without predictors.
        state_name: what the routers keep, `thresholds` or `correction_bias`; None if nothing.
        state: (L, E) that; None if nothing.
    """

    loads: Tensor
    capacity: Tensor
    mean_capacity: Tensor
    accuracy: Tensor | None
    state_name: str | None
    state: Tensor | None


@torch.no_grad()
def routing_statistics(
    records: list[list[RoutingRecord]],
    noise_levels: list[Tensor],
    model: DiT,
    processes: Processes,
) -> RoutingStatistics | None:
    """Statistics of one step; None for a model without MoE layers. All processes call it.

    Args:
        records: for each micro-batch of this process, the records of the layers.
        noise_levels: for each micro-batch, (B,).
        model: that made them.
        processes: one reduction over them for all layers.
    """
    if not records[0]:
        return None
    keeping = keepers(model)
    predicts = records[0][0].capacity_logits is not None
    bins = [(level.float() * BINS).long().clamp(0, BINS - 1) for level in noise_levels]
    rows = []
    for i, layers in enumerate(zip(*records, strict=True)):
        rows.append(_layer(layers, bins, keeping[i].state if predicts else None))
    table = processes.all_reduce_sum(torch.stack(rows)).cpu()  # (L, E + 2 BINS + 2)
    loads, sums, counts, right = table.split([table.shape[1] - 2 * BINS - 2, BINS, BINS, 2], dim=1)
    return RoutingStatistics(
        loads=loads,
        capacity=sums / counts,
        mean_capacity=sums.sum(dim=1) / counts.sum(dim=1),
        accuracy=right[:, 0] / right[:, 1] if predicts else None,
        state_name=keeping[0].state_name if keeping else None,
        state=torch.stack([keeper.state for keeper in keeping]).cpu() if keeping else None,
    )


def _layer(
    records: tuple[RoutingRecord, ...], bins: list[Tensor], thresholds: Tensor | None
) -> Tensor:
    """Sums of one layer in one row: loads, capacity and samples by bin, right pairs, all pairs."""
    loads = torch.stack([r.counts.sum(dim=0) for r in records]).sum(dim=0).double()
    by_bin, right = loads.new_zeros(2, BINS), loads.new_zeros(2)
    for record, place in zip(records, bins, strict=True):
        capacity = record.capacity_per_sample().double()
        if thresholds is not None:
            above = record.capacity_logits.sigmoid() > thresholds  # (B * S, E)
            capacity = above.view(len(place), -1).sum(dim=1) / record.num_tokens
            right += torch.stack(
                [
                    (above == record.capacity_targets.bool()).sum(),
                    torch.tensor(above.numel()).to(above.device),
                ]
            )
        by_bin[0].index_add_(0, place, capacity.double())
        by_bin[1].index_add_(0, place, torch.ones_like(place, dtype=torch.float64))
    return torch.cat([loads, by_bin.flatten(), right])
