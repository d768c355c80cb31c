"""Figures of where the computation goes.

Shapes: T evaluations, L layers, E experts, K classes, M mapped samples, S tokens of one sample.
"""

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


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with complete_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


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
    axes.axhline(1.0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="model evaluation, from noise to data", ylabel="capacity C_infer")
    axes.set_title("Computation over sampling: mean and range of the layers", fontsize=10)
    axes.legend(frameon=False)
    return figure


def expert_figure(shares: np.ndarray) -> Figure:
    """Share of the tokens that each expert of each layer computes over the steps (as Fig. 12).

    Args:
        shares: (T, L, E) of the conditional half.
    """
    layers = shares.shape[1]
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure = Figure(figsize=(2.6 * columns, 2.1 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for layer, axes in enumerate(grid.flat):
        axes.set_visible(layer < layers)
        if layer < layers:
            axes.plot(np.arange(1, len(shares) + 1), shares[:, layer], lw=0.9)
            axes.set_title(f"MoE layer {layer + 1}", fontsize=9)
    figure.supxlabel("model evaluation, from noise to data", fontsize=9)
    figure.supylabel("share of tokens, one line an expert", fontsize=9)
    return figure


def class_figure(
    classes: np.ndarray, names: Sequence[str], labels: np.ndarray, images: np.ndarray | None
) -> Figure:
    """Capacity of the hardest and the easiest classes, with their images (as Figs. 13 and 14).

    Args:
        classes: (K,) C_infer, NaN for classes without a sample.
        names: of the classes.
        labels: (N,) of the samples.
        images: (N, H, W, 3) uint8, or None.
    """
    known = np.flatnonzero(np.isfinite(classes))
    order = known[np.argsort(-classes[known], kind="stable")]
    count = min(CLASSES, len(order) // 2)
    shown = [*order[:count], *order[len(order) - count :]]
    figure = Figure(figsize=(7, 0.62 * len(shown) + 0.8), layout="constrained")
    bars, pictures = figure.subplots(1, 2, width_ratios=(1.2, 1))
    places = np.arange(len(shown))
    colours = ["tab:red"] * count + ["tab:blue"] * count
    bars.barh(places, classes[shown], color=colours)
    bars.set_yticks(places, [names[k] for k in shown])
    bars.set_ylim(len(shown) - 0.5, -0.5)
    spread = np.ptp(classes[shown]) or 1.0
    bars.set_xlim(classes[shown].min() - 0.3 * spread, classes[shown].max() + 0.1 * spread)
    bars.set_xlabel("capacity C_infer")
    bars.set_title(f"{count} hardest and {count} easiest classes", fontsize=10)
    pictures.set_axis_off()
    if images is not None:
        pictures.imshow(_rows_of_images(shown, labels, images))
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
    times: np.ndarray, maps: np.ndarray, images: np.ndarray | None, columns: int = 6
) -> Figure:
    """Pairs of each token over the image at some steps, averaged over the layers.

    Args:
        times: (T,) of the evaluations.
        maps: (T, M, S), S a square number.
        images: (at least M, H, W, 3) uint8, or None.
        columns: steps that are shown.
    """
    side = round(maps.shape[-1] ** 0.5)
    steps = np.unique(np.linspace(0, len(maps) - 1, columns).round().astype(int))
    shown, first = maps.shape[1], int(images is not None)
    figure = Figure(figsize=(1.2 * (len(steps) + first), 1.2 * shown + 0.5), layout="constrained")
    grid = figure.subplots(shown, len(steps) + first, squeeze=False)
    highest = max(float(maps[steps].max()), 1e-6)
    for row in range(shown):
        if images is not None:
            _picture(grid[row, 0], images[row], "sample" if row == 0 else "")
        for column, step in enumerate(steps):
            values = maps[step, row].astype(np.float32).reshape(side, side)
            title = f"t = {times[step]:.3g}" if row == 0 else ""
            drawn = _picture(grid[row, column + first], values, title, vmin=0, vmax=highest)
    figure.colorbar(drawn, ax=grid, shrink=0.6, label="experts per token")
    return figure


def _picture(axes: Axes, values: np.ndarray, title: str, **options: float) -> object:
    axes.set_axis_off()
    axes.set_title(title, fontsize=8)
    return axes.imshow(values, **options)
