"""python -m models.summary --config diffmoe/L_E16_flow [--json]
python -m models.summary --compare dit/L_flow diffmoe/L_E16_flow ...

Parameters of a model by what they are for, and how many of them work on average for a token; or
several configs side by side. Nothing is allocated: models are built on the meta device.
"""

import argparse
import json
import sys
from dataclasses import dataclass

import torch

from config.layers import MoEConfig
from config.load import parse_config
from config.model import ModelConfig
from config.schema import Config
from core.command_line import Parser
from core.errors import command
from models.build import build_model
from models.flops import forward_flops

BY_NAME = {
    **dict.fromkeys(("dense FFN", "routed experts", "shared experts", "time embedding"), "FFN"),
    **dict.fromkeys(("router", "predictor"), "router"),
    **dict.fromkeys(("adaLN", "final adaLN"), "adaLN"),
    "attention": "attention",
}
"""Groups of the published counts by the model's own roles; the rest is `others`. The timestep MLP
is an FFN there, since its official name has `mlp` in it."""

BY_TABLE = {
    **dict.fromkeys(("dense FFN", "routed experts", "shared experts"), "FFN"),
    **dict.fromkeys(("router", "predictor"), "FFN"),
    "attention": "attention",
    "adaLN": "adaLN",
}
"""Groups of the paper's Table 9: FFN has router and predictor, adaLN the blocks' alone."""

CAPACITIES = (0.95, 1.0)
BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments in float32; every average takes four more."""


@dataclass(frozen=True)
class Summary:
    """Counts of parameters.

    Attributes:
        roles: trainable parameters by the role that the model names.
        positions: numbers in the frozen table of positions, which the published totals include.
        num_experts: experts of a layer, 0 without.
        capacity: experts that compute a token in training, C.
        inference_capacity: the same in top-k inference where it differs.
        fits_equation: experts are as wide as the dense layers and in every second block, as Eq. 40
            of the paper supposes.
    """

    roles: dict[str, int]
    positions: int
    num_experts: int
    capacity: float
    inference_capacity: float | None
    fits_equation: bool

    @property
    def capacities(self) -> list[float]:
        """Those that the model has, training first."""
        other = self.inference_capacity
        return [self.capacity, *([] if other in (None, self.capacity) else [other])]

    @property
    def trainable(self) -> int:
        """Without the table of positions."""
        return sum(self.roles.values())

    @property
    def total(self) -> int:
        """With the table of positions, as the published counts have it."""
        return self.trainable + self.positions

    @property
    def routed_experts(self) -> int:
        """In the experts of all MoE layers."""
        return self.roles.get("routed experts", 0)

    @property
    def by_name(self) -> dict[str, int]:
        """Groups by official parameter name; others has the table of positions."""
        groups = _grouped(self.roles, BY_NAME)
        return groups | {"others": groups["others"] + self.positions}

    @property
    def by_table(self) -> dict[str, int]:
        """Groups of the paper's Table 9, trainable parameters."""
        return _grouped(self.roles, BY_TABLE)

    def activated(self, capacity: float) -> float:
        """Average parameters at work for a token, counted: each expert serves C / E of them."""
        if not self.num_experts:
            return self.total
        return self.total - self.routed_experts * (1 - capacity / self.num_experts)

    def activated_by_equation(self, capacity: float) -> float:
        """The paper's estimate (Eq. 40) on the groups of its Table 9."""
        groups = self.by_table
        share = (1 + capacity) / (1 + self.num_experts) if self.num_experts else 1.0
        return share * groups["FFN"] + sum(n for group, n in groups.items() if group != "FFN")


def _grouped(roles: dict[str, int], groups: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for role, count in roles.items():
        group = groups.get(role, "others")
        counts[group] = counts.get(group, 0) + count
    return counts


def summarize(config: ModelConfig) -> Summary:
    """Count the parameters of the model of `config`."""
    with torch.device("meta"):
        model = build_model(config)
    layer = config.feed_forward
    routed = isinstance(layer, MoEConfig)
    plain = routed and layer.shared_mlp == "none" and layer.expert_mlp in (None, config.mlp)
    alike = plain and config.expert_width() == config.dense_width()
    return Summary(
        roles=model.parameters_by_role(),
        positions=model.positions.numel() if config.positions == "sincos" else 0,
        num_experts=layer.all_experts() if routed else 0,
        capacity=layer.experts_per_token() if routed else 1.0,
        inference_capacity=getattr(layer, "inference_capacity", None),
        fits_equation=not routed or (alike and 2 * len(config.moe_blocks()) == config.depth),
    )


def _report(summary: Summary) -> dict:
    report = {
        "total": summary.total,
        "trainable": summary.trainable,
        "roles": summary.roles,
        "groups_by_name": summary.by_name,
        "groups_of_table_9": summary.by_table,
        "routed_experts": summary.routed_experts,
    }
    activated = {f"C={c:g}": summary.activated(c) for c in summary.capacities}
    if summary.fits_equation:
        capacities = sorted({*CAPACITIES, *summary.capacities})
        for key, count in (
            ("activated", summary.activated),
            ("activated_eq_40", summary.activated_by_equation),
        ):
            report[key] = {f"C={c:g}": round(count(c)) for c in capacities}
    else:
        report["activated"] = {own: round(count) for own, count in activated.items()}
    # The tables of DSMoE and JiTMoE print their own models in these units.
    in_binary = {own: round(count / 2**20, 2) for own, count in activated.items()}
    return report | {"activated_in_2^20": in_binary}


def _text(report: dict) -> str:
    lines = []
    for key, value in report.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        for name, count in rows:
            shown = count if key == "activated_in_2^20" else count / 1e6
            unit = " Mi" if key == "activated_in_2^20" else " M"
            lines.append(f"{key.replace('_', ' '):<20}{name:<16}{shown:>10.2f}{unit}")
    return "\n".join(lines)


def comparison(name: str, config: Config) -> dict[str, object]:
    """One row of --compare: what a config costs, by arithmetic.

    Memory is that of weights, gradients, moments and averages on each process under DDP.
    Activations come on top, and depend on the micro-batch.
    """
    summary = summarize(config.model)
    averages = 1 + len(config.optim.extra_ema_decays)
    size = summary.trainable * (BYTES_PER_PARAMETER + 4 * averages)
    return {
        "config": name,
        "total (M)": round(summary.total / 1e6, 1),
        "activated (M)": round(summary.activated(summary.capacity) / 1e6, 1),
        "GFLOPs per image": round(forward_flops(config.model) / 1e9, 1),
        "training state (GB)": round(size / 1e9, 1),
        "batch": config.train.global_batch_size,
        "steps (K)": round(config.train.max_steps / 1e3),
    }


def markdown(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        "models.summary",
        __doc__,
        usage="%(prog)s (--config NAME | --compare NAME ...) [--json] [--KEY VALUE ...]",
        epilog="Every key of a config is a flag, as in train.py --help: --model.depth 12",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="YAML file, or a name such as diffmoe/L_E16_flow")
    which.add_argument("--compare", nargs="+", help="several of them, as one Markdown table")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_known_args()


@command
def main() -> None:
    """Parse the command line and print the counts."""
    flags, keys = _parse()

    def config_of(name: str) -> Config:
        return parse_config(["--config", name, *keys], "models.summary", world_size=None)

    if flags.compare:
        found: object = [comparison(name, config_of(name)) for name in flags.compare]
    else:
        found = _report(summarize(config_of(flags.config).model))
    if flags.json:
        text = json.dumps(found, indent=2)
    else:
        text = markdown(found) if flags.compare else _text(found)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
