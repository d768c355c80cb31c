"""python -m models.summary --config config/NAME.yaml [--json] [any other flag of train.py]

Parameters of a model, by kind, and how many of them work on average for a token. Nothing is
allocated: the model is built on the meta device.
"""

import json
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from config.load import parse_config
from config.model import FeedForwardConfig, TopKConfig
from config.schema import DeepSeekConfig, DenseConfig, ModelConfig
from core.errors import command
from models.build import build_model
from models.official import to_official

GROUPS = ("FFN", "attention", "adaLN", "router", "others")
CAPACITIES = (0.95, 1.0)


@dataclass(frozen=True)
class Summary:
    """Counts of parameters.

    Attributes:
        total: with the frozen table of positions, as the published counts have it.
        trainable: without it.
        by_name: groups by official parameter name; FFN has the timestep MLP, adaLN the final
            layer's modulation.
        by_table: groups of the paper's Table 9: FFN has router and predictor, adaLN the blocks'
            modulation only; trainable parameters.
        routed_experts: in the experts of all MoE layers.
        num_experts: experts of a layer, 0 without.
        capacity: C in training.
    """

    total: int
    trainable: int
    by_name: dict[str, int]
    by_table: dict[str, int]
    routed_experts: int
    num_experts: int
    capacity: float

    def activated(self, capacity: float) -> float:
        """Average parameters at work for a token, counted: each expert serves C / E of them."""
        if not self.num_experts:
            return self.total
        return self.total - self.routed_experts * (1 - capacity / self.num_experts)

    def activated_by_equation(self, capacity: float) -> float:
        """The paper's estimate (Eq. 40) on the groups of its Table 9; half the blocks are MoE."""
        share = (1 + capacity) / (1 + self.num_experts) if self.num_experts else 1.0
        rest = sum(count for group, count in self.by_table.items() if group != "FFN")
        return share * self.by_table["FFN"] + rest


def summarize(config: ModelConfig) -> Summary:
    """Count the parameters of the model of `config`."""
    with torch.device("meta"):
        model = build_model(config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = to_official(model, trainable)
    positions = model.positions.numel() if config.positions == "sincos" else 0
    by_name, by_table = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    for name, tensor in named.items():
        by_name[_group_by_name(name)] += tensor.numel()
        by_table[_group_by_table(name)] += tensor.numel()
    by_name["others"] += positions
    layer = config.feed_forward
    dense = isinstance(layer, DenseConfig)
    return Summary(
        total=_count(named) + positions,
        trainable=_count(named),
        by_name={g: n for g, n in by_name.items() if n},
        by_table={g: n for g, n in by_table.items() if n},
        routed_experts=_count({n: t for n, t in named.items() if ".mlp.experts." in n}),
        num_experts=0 if dense else layer.num_experts,
        capacity=1.0 if dense else _capacity(layer),
    )


def _capacity(layer: object) -> float:
    return float(layer.top_k if isinstance(layer, TopKConfig) else layer.capacity)


def _count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _group_by_name(name: str) -> str:
    if "gate.weight" in name or "gate_weight" in name or "capacity_predictor" in name:
        return "router"
    for mark, group in ((".mlp.", "FFN"), (".attn.", "attention"), ("adaLN", "adaLN")):
        if mark in name:
            return group
    return "others"


def _group_by_table(name: str) -> str:
    if not name.startswith("blocks."):
        return "others"
    group = _group_by_name(name)
    return "FFN" if group == "router" else group


def _report(summary: Summary, layer: FeedForwardConfig) -> dict:
    report = {
        "total": summary.total,
        "trainable": summary.trainable,
        "groups_by_name": summary.by_name,
        "groups_of_table_9": summary.by_table,
        "routed_experts": summary.routed_experts,
    }
    own = f"C={summary.capacity:g}"
    activated = summary.activated(summary.capacity)
    if isinstance(layer, DeepSeekConfig):
        report["activated"] = {own: round(activated)}
    else:
        capacities = sorted({*CAPACITIES, summary.capacity})
        for key, count in (
            ("activated", summary.activated),
            ("activated_eq_40", summary.activated_by_equation),
        ):
            report[key] = {f"C={c:g}": round(count(c)) for c in capacities}
    # The tables of DSMoE and JiTMoE print their own models in these units.
    return report | {"activated_in_2^20": {own: round(activated / 2**20, 2)}}


def _table(report: dict) -> str:
    lines = []
    for key, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, count in rows:
            shown = count if key == "activated_in_2^20" else count / 1e6
            unit = " Mi" if key == "activated_in_2^20" else " M"
            lines.append(f"{key.replace('_', ' '):<20}{name:<12}{shown:>10.2f}{unit}")
    return "\n".join(lines)


@command
def main() -> None:
    """Parse the command line and print the counts."""
    argv = [word for word in sys.argv[1:] if word != "--json"]
    model = parse_config(argv, "models.summary").model
    report = _report(summarize(model), model.feed_forward)
    text = json.dumps(report, indent=2) if "--json" in sys.argv else _table(report)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
