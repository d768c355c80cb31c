"""python scripts/miniature_report.py runs/miniature docs/miniature.png

Draw the loss curves of the runs DIR/LAYER_SEED, and print their scores as Markdown: means of the
seeds and, in brackets, the largest distance from the mean.
"""

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data.compositions import TAGS
from evaluations.figures import save_figure
from evaluations.geneval import COLUMNS, overall, read_results, task_scores

NAMES = {"dense": "Dense", "diffmoe": "DiffMoE"}
COLOURS = {"dense": "tab:grey", "diffmoe": "tab:red"}
FIRST = 300
"""Step that the figure begins with: before, all curves fall as one."""
WINDOW = 5
"""Entries of the log that a point of a curve is the mean of."""


def curve(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the smoothed loss at each."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(one["step"], one["loss/mse"]) for one in entries if "loss/mse" in one]
    steps, losses = map(np.array, zip(*found, strict=True))
    kernel = np.ones(WINDOW) / WINDOW
    return steps[WINDOW - 1 :], np.convolve(losses, kernel, mode="valid")


def main(folder: Path, out: Path) -> None:
    """Read the runs, write the figure and print the table."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = [["", *COLUMNS.values(), "Overall", "last loss"], ["---"] * 9]
    for layer, name in NAMES.items():
        runs = sorted(folder.glob(f"{layer}_*"))
        curves = [curve(run) for run in runs]
        for seed, (steps, losses) in enumerate(curves):
            shown = steps >= FIRST
            axes.plot(
                steps[shown],
                losses[shown],
                color=COLOURS[layer],
                lw=1,
                label=None if seed else name,
            )
        scores = [task_scores(read_results(run / "results.jsonl")) for run in runs]
        columns = [[one[tag] for one in scores] for tag in TAGS]
        columns += [[overall(one) for one in scores], [losses[-1] for _, losses in curves]]
        rows.append([name, *map(_text, columns)])
    axes.set(xlabel="step", ylabel="loss")
    axes.set_title("Text-to-image in miniature: three seeds of each", fontsize=10)
    axes.legend(frameon=False)
    save_figure(figure, out)
    sys.stdout.write("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")


def _text(values: list[float]) -> str:
    mean = np.mean(values)
    return f"{mean:.3f} ({max(abs(values - mean)):.3f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
