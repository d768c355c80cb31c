"""python -m evaluations.compare samples/*/*/ --runs RUN ... --out DIR

Sets of samples, by their folders or records, as one Markdown table, and figures of several runs:
loss over the steps (as Figs. 3 and 4) and, of their scored sets, FID over the steps (as Figs. 8
and 9).
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from config.load import build_config
from core.errors import UserError, command
from core.limits import check_out_folder
from core.logging import get_logger
from evaluations.figures import save_figure
from models.summary import summarize
from sampling.marks import check_files
from sampling.needs import NotingParser, refuse_typed
from sampling.sets import RECORD_FILE, Record, read_set

SCORES = ("FID", "sFID", "IS", "precision", "recall", "FD-digits", "accuracy")
METRICS_FILE = "metrics.jsonl"

log = get_logger("evaluations.compare")


def read_rows(paths: list[Path]) -> list[dict[str, object]]:
    """A row for each set: settings, scores, cost.

    Args:
        paths: records of sets.

    Raises:
        UserError: a file is no record of a set, or does not belong to the files beside it.
    """
    records = [_record(path) for path in paths]
    return [
        _row(path, record, run)
        for path, record, run in zip(paths, records, _runs(records), strict=True)
    ]


def _record(path: Path) -> Record:
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no record of a set of samples: {error}") from error
    if not is_record(record):
        raise UserError(f"{path}: no record of a set of samples")
    if path.name == RECORD_FILE:
        check_files(*read_set(path))
    return record


def is_record(found: object) -> bool:
    """Whether the content of a JSON file is the record of a set."""
    return isinstance(found, dict) and {"config", "step", "sampler", "nfe"} <= found.keys()


def _runs(records: list[Record]) -> list[str]:
    """Names of the runs, or their folders where two of them have the same name."""
    names = [r.get("run") or Path(r["config"]["run_dir"]).name for r in records]
    folders = [str(_run_folder(record)) for record in records]
    known: dict[str, set[str]] = {}
    for name, folder in zip(names, folders, strict=True):
        known.setdefault(name, set()).add(folder)
    both = zip(names, folders, strict=True)
    return [name if len(known[name]) == 1 else folder for name, folder in both]


def _run_folder(record: Record) -> Path:
    if "checkpoint" not in record:
        return Path(record["config"]["run_dir"])
    folder = Path(record["checkpoint"]).absolute()
    return folder.parent.parent if folder.parent.name == "checkpoints" else folder


def _row(path: Path, record: Record, run: str) -> dict[str, object]:
    try:
        model = build_config(record["config"]).model
        steps, scale = record["num_steps"], record["cfg_scale"]
        return (
            {"run": run, "step": record["step"]}
            | {"sampler": f"{record['sampler']} {steps}", "cfg": scale}
            | {"batch": record["per_proc_batch_size"], "inference": _inference(record)}
            | {name: record.get("scores", {}).get(name) for name in SCORES}
            | {"C_infer": record["capacity_infer"]}
            | {"activated (M)": _activated(model, record["capacity_infer"])}
            | {"NFE": record["nfe"], "images/s": record["images_per_second"]}
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of a set of samples: {error!r}") from error


def _inference(record: dict) -> str | None:
    """Routing of the layer as the set had it."""
    layer = record["config"]["model"]["feed_forward"]
    rule = layer.get("inference")
    if rule == "fixed":
        return f"fixed {layer['fixed_threshold']:g}"
    if rule == "topk":  # a race takes so many pairs for each token
        count = layer.get("inference_capacity") or layer.get("capacity") or layer["top_k"]
        return f"topk {count:g}"
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
    parser = NotingParser("evaluations.compare", __doc__)
    parser.add_argument("sets", type=Path, nargs="*", help="folders of sets, or their JSON files")
    parser.add_argument("--runs", type=Path, nargs="+", default=[], help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the figures")
    return parser.parse_args()


def records_in(paths: list[Path]) -> list[Path]:
    """The records of sets among folders and JSON files, each once; others are passed over.

    Raises:
        UserError: a path that is not there or not readable, or no record among them.
    """
    found, others = {}, []
    for path in paths:
        file = path / RECORD_FILE if path.is_dir() else path
        if path.is_dir() and not file.exists():
            others.append(path)
            continue
        try:
            known = is_record(json.loads(file.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: no record of a set of samples: {error}") from error
        if known:
            found[file.resolve()] = file
        else:
            others.append(path)
    named = ", ".join(map(str, others[:3])) + (" ..." if len(others) > 3 else "")
    if not found:
        raise UserError(f"compare: no record of a set of samples among {named}")
    if others:
        log.info("passed over, no record of a finished set: %s", named)
    return list(found.values())


@command
def main() -> None:
    """Parse the command line, print the table and draw the figures."""
    flags = _parse()
    if not flags.sets and not flags.runs:
        raise UserError("compare: names no set and no run")
    check_out_folder("--out", flags.out)
    rows = read_rows(records_in(flags.sets)) if flags.sets else []
    figures = {"loss": loss_figure(flags.runs)} if flags.runs else {}
    for score in ("FID", "FD-digits"):
        if rows and all(row[score] is not None for row in rows):
            figures[score] = score_figure(rows, score)
    if not figures:
        refuse_typed(flags, ["out"], "does nothing here; it needs --runs, or sets with scores")
    if rows:
        sys.stdout.write(markdown(rows) + "\n")
    for name, figure in figures.items():
        save_figure(figure, flags.out / f"{name}.png")


if __name__ == "__main__":
    main()
