"""Figures of where the computation goes.

Shapes: T evaluations, L layers, E experts, K classes, M mapped samples, S tokens of one sample.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from core.files import complete_file

CLASSES = 5
"""Classes shown at each end."""

IMAGES = 5
"""Images of each."""

LETTERS = 26
"""Of a class's name, or of a prompt, in a line."""


def save_figure(figure: Figure, path: Path, texts: dict[str, str] | None = None) -> None:
    """Write a figure as PNG, with texts by name in its metadata."""
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata=texts)


def step_figure(layers: np.ndarray, sides: Sequence[str]) -> Figure:
    """Capacity over the sampling steps (as the paper's Fig. 1c), halves of guidance apart.

    Args:
        layers: (T, 2, L) C_infer of each layer, NaN where a half was not run.
        sides: names of the halves.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, len(layers) + 1)
    for half, name in enumerate(sides):
        if np.isnan(layers[:, half]).all():
            continue
        mean = layers[:, half].mean(axis=-1)
        (line,) = axes.plot(steps, mean, label=name)
        low, high = layers[:, half].min(axis=-1), layers[:, half].max(axis=-1)
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, lw=0)
    axes.axhline(1.0, color="grey", lw=0.8, ls=":", label="a dense model")
    axes.set(xlabel="model evaluation, from noise to data", ylabel="experts per token, C_infer")
    axes.set_ylim(bottom=0.0)
    axes.set_title("Computation over sampling: mean and range of the layers", fontsize=10)
    axes.legend(frameon=False, loc="lower left")
    return figure


def expert_figure(shares: np.ndarray) -> Figure:
    """Share of the tokens that each expert of each layer computes over the steps (as Fig. 12).

    Args:
        shares: (T, L, E) of the conditional half.
    """
    layers = shares.shape[1]
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure = Figure(figsize=(3.0 * columns, 2.2 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for layer, axes in enumerate(grid.flat):
        axes.set_visible(layer < layers)
        if layer < layers:
            axes.plot(np.arange(1, len(shares) + 1), shares[:, layer], lw=0.9)
            axes.set_title(f"MoE layer {layer + 1}", fontsize=9)
    grid[0, 0].set_ylim(bottom=0.0)  # shared; set once all lines are there, lest it stop growing
    figure.supxlabel("model evaluation, from noise to data", fontsize=9)
    figure.supylabel("share of tokens", fontsize=9)
    figure.suptitle("What each expert computes (one line an expert)", fontsize=10)
    return figure


def class_figure(
    classes: np.ndarray,
    names: Sequence[str],
    labels: np.ndarray,
    images: np.ndarray | None,
    kind: str = "classes",
) -> Figure:
    """Capacity of the hardest and the easiest classes, with their images (as Figs. 13 and 14).

    Args:
        classes: (K,) C_infer, NaN for classes without a sample.
        names: of the classes.
        labels: (N,) of the samples.
        images: (N, H, W, 3) uint8, or None.
        kind: what they are, `classes` or `prompts`.
    """
    known = np.flatnonzero(np.isfinite(classes))
    order = known[np.argsort(-classes[known], kind="stable")]
    count = min(CLASSES, len(order) // 2)
    shown = [*order[:count], *order[len(order) - count :]]
    side = 0.62  # of an image, in inches
    figure = Figure(figsize=(4.2 + IMAGES * side, side * len(shown) + 0.9), layout="constrained")
    bars, pictures = figure.subplots(1, 2, width_ratios=(3.2, IMAGES * side), sharey=True)
    places = np.arange(len(shown))
    colours = ["tab:red"] * count + ["tab:blue"] * count
    bars.barh(places, classes[shown], color=colours)
    bars.set_yticks(places, [textwrap.fill(names[k], LETTERS) for k in shown])
    bars.set_ylim(len(shown) - 0.5, -0.5)
    bars.bar_label(bars.containers[0], fmt=" %.2f", fontsize=8)
    bars.axvline(1.0, color="grey", lw=0.8, ls=":")
    bars.set_xlim(0.0, 1.15 * classes[shown].max())
    bars.set_xlabel("experts per token, C_infer")
    bars.set_title(f"{count} hardest and {count} easiest {kind}", fontsize=10)
    pictures.set_axis_off()
    if images is not None:
        extent = (0, IMAGES, len(shown) - 0.5, -0.5)  # a row of images beside each bar
        picture = _rows_of_images(shown, labels, images)
        pictures.imshow(picture, extent=extent, aspect="auto", interpolation="nearest")
    return figure


def _rows_of_images(shown: Sequence[int], labels: np.ndarray, images: np.ndarray) -> np.ndarray:
    """A picture with a row of images for each class."""
    H, W = images.shape[1:3]
    picture = np.full((len(shown) * H, IMAGES * W, 3), 255, np.uint8)
    for row, label in enumerate(shown):
        for column, index in enumerate(np.flatnonzero(labels[: len(images)] == label)[:IMAGES]):
            picture[row * H : (row + 1) * H, column * W : (column + 1) * W] = images[index]
    return picture


def map_figure(
    times: np.ndarray, maps: np.ndarray, images: np.ndarray | None, columns: int = 4, rows: int = 4
) -> Figure:
    """Experts at work for each token, over the image, beside the sample that they made.

    Each map is the mean over a part of the sampling, the last one over all of it: single steps are
    noisier than what they have in common.

    Args:
        times: (T,) of the evaluations.
        maps: (T, M, S) averaged over the layers, S a square number.
        images: (at least M, H, W, 3) uint8, or None.
        columns: parts of the sampling.
        rows: samples that are shown.
    """
    side, shown = round(maps.shape[-1] ** 0.5), min(rows, maps.shape[1])
    parts = [part for part in np.array_split(np.arange(len(maps)), columns) if len(part)]
    titles = [f"t = {times[part[0]]:.2g} to {times[part[-1]]:.2g}" for part in parts]
    parts, titles = [*parts, np.arange(len(maps))], [*titles, "all steps"]
    means = np.stack([maps[part, :shown].astype(np.float32).mean(axis=0) for part in parts])
    first = int(images is not None)
    size = (1.75 * (len(parts) + first) + 0.9, 1.75 * shown + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(shown, len(parts) + first, squeeze=False)
    highest = max(float(np.quantile(means, 0.995)), 1e-6)
    for row in range(shown):
        if images is not None:
            _picture(grid[row, 0], images[row], "sample" if row == 0 else "")
        for column, values in enumerate(means[:, row]):
            title = titles[column] if row == 0 else ""
            drawn = _picture(
                grid[row, column + first],
                values.reshape(side, side),
                title,
                vmin=0,
                vmax=highest,
                cmap="inferno",
            )
    figure.colorbar(drawn, ax=grid, shrink=0.7, label="experts per token")
    return figure


def _picture(axes: Axes, values: np.ndarray, title: str, **options: object) -> object:
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    return axes.imshow(values, **options)
