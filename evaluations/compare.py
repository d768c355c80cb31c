"""python -m evaluations.compare SET.json ... [--runs RUN ...] [--out DIR]

Sets of samples as one Markdown table, and figures of several runs: loss over the steps (as Figs. 3
and 4) and, of their scored sets, FID over the steps (as Figs. 8 and 9).
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from config.load import build_config
from core.command_line import Parser
from core.errors import UserError, command
from evaluations.figures import save_figure
from models.summary import summarize

SCORES = ("FID", "sFID", "IS", "precision", "recall", "FD-digits", "accuracy")
METRICS_FILE = "metrics.jsonl"


def read_rows(paths: list[Path]) -> list[dict[str, object]]:
    """A row for each set: settings, scores, cost.

    Raises:
        UserError: a file is no record of a set.
    """
    rows = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
            model = build_config(record["config"]).model
            steps, scale = record["num_steps"], record["cfg_scale"]
            rows.append(
                {"run": Path(record["config"]["run_dir"]).name, "step": record["step"]}
                | {"sampler": f"{record['sampler']} {steps}", "cfg": scale}
                | {"batch": record["per_proc_batch_size"], "inference": _inference(record)}
                | {name: record.get("scores", {}).get(name) for name in SCORES}
                | {"C_infer": record["capacity_infer"]}
                | {"activated (M)": _activated(model, record["capacity_infer"])}
                | {"NFE": record["nfe"], "images/s": record["images_per_second"]}
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no record of a set of samples: {error!r}") from error
    return rows


def _inference(record: dict) -> str | None:
    """Routing of the layer as the set had it."""
    layer = record["config"]["model"]["feed_forward"]
    rule = layer.get("inference")
    if rule == "fixed":
        return f"fixed {layer['fixed_threshold']:g}"
    if rule == "topk":
        return f"topk {layer['inference_capacity'] or layer['capacity']:g}"
    return rule


def _activated(model: object, capacity: float | None) -> float:
    summary = summarize(model)
    return summary.activated(1.0 if capacity is None else capacity) / 1e6


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a table; columns that no row fills are left out."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    lines = [columns, ["---"] * len(columns)]
    lines += [[_text(row[name]) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def loss_figure(runs: list[Path]) -> Figure:
    """Training loss over the steps of several runs.

    Raises:
        UserError: a run has no log.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        try:
            lines = (run / METRICS_FILE).read_text().splitlines()
            entries = [e for e in map(json.loads, lines) if "loss/loss" in e]
        except (OSError, ValueError) as error:
            raise UserError(f"{run}: no log of a run: {error}") from error
        axes.plot([e["step"] for e in entries], [e["loss/loss"] for e in entries], label=run.name)
    axes.set(xlabel="training step", ylabel="diffusion loss")
    axes.legend(frameon=False)
    return figure


def score_figure(rows: list[dict[str, object]], score: str) -> Figure:
    """A score of scored sets over the training steps, a line for each run."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for run in dict.fromkeys(row["run"] for row in rows):
        points = sorted((r["step"], r[score]) for r in rows if r["run"] == run and r[score])
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, label=run)
    axes.set(xlabel="training step", ylabel=score)
    axes.legend(frameon=False)
    return figure


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.compare", __doc__)
    parser.add_argument("sets", type=Path, nargs="*", help="JSON files of sample_ddp.py")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figures")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, print the table and draw the figures."""
    flags = _parse()
    if not flags.sets and not flags.runs:
        raise UserError("compare: names no set and no run")
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.runs:
        save_figure(loss_figure(flags.runs), flags.out / "loss.png")
    if flags.sets:
        rows = read_rows(flags.sets)
        sys.stdout.write(markdown(rows) + "\n")
        for score in ("FID", "FD-digits"):
            if all(row[score] is not None for row in rows):
                save_figure(score_figure(rows, score), flags.out / f"{score}.png")


if __name__ == "__main__":
    main()
