"""Figures of what `sampling.pipeline` returns.

Shapes: T evaluations, L layers, N samples, S tokens of an image.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from core.errors import UserError
from evaluations.figures import class_figure
from evaluations.overlay import COLOURS, overlay
from sampling.pipeline import Result

SIDE = 1.75
"""Inches of a picture."""


def overlay_figure(
    result: Result, steps: Sequence[int] | None = None, layer: int | None = None
) -> Figure:
    """Experts at work for each token over the images, with their scale.

    Args:
        result: of `Pipeline.sample`.
        steps: numbers of evaluations, a column for each; by default the mean over all of them.
        layer: its number from 0; by default the mean over the layers.

    Raises:
        UserError: the model or the layer has no maps, or there is no such step or layer.
    """
    numbers = _numbers(result, layer)
    for step in steps or []:
        if not 0 <= step < len(numbers):
            raise UserError(f"step: {step} is not allowed; allowed: 0 ... {len(numbers) - 1}")
    chosen = [numbers.mean(axis=0)] if steps is None else [numbers[step] for step in steps]
    titles = ["mean over the steps"] if steps is None else [f"evaluation {n + 1}" for n in steps]
    top = max(float(np.quantile(chosen, 0.995)), 1e-6)
    rows, columns = len(result.images), 1 + len(chosen)
    figure = Figure(figsize=(SIDE * columns + 0.9, SIDE * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    pictures = [result.images, *(overlay(result.images, maps, top) for maps in chosen)]
    for column, (shown, title) in enumerate(zip(pictures, ["sample", *titles], strict=True)):
        grid[0, column].set_title(title, fontsize=10)
        for axes, picture in zip(grid[:, column], shown, strict=True):
            axes.set_axis_off()
            axes.imshow(picture, interpolation="nearest")
    scale = ScalarMappable(Normalize(0, top), COLOURS)
    figure.colorbar(scale, ax=grid, shrink=0.7, label="experts per token")
    return figure


def capacity_figure(
    results: Result | Mapping[str, Result], by_layer: bool = False, dense: float = 1.0
) -> Figure:
    """Experts per token over the sampling, against a dense model: a line for each result or layer.

    Args:
        results: one, or several by the names that the lines have.
        by_layer: a line for each layer, of a single result.
        dense: experts per token that cost as much as a dense layer, 1 / `Pipeline.cost()`.

    Raises:
        UserError: a model without experts, or layers of several results.
    """
    named = results if isinstance(results, Mapping) else {"C_infer": results}
    if by_layer and len(named) != 1:
        raise UserError(f"by_layer: {len(named)} results at once; allowed: one")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, result in named.items():
        lines = capacity_lines(_routing(result).capacity)  # (T, L)
        if by_layer:
            for number, line in enumerate(lines.T, 1):
                axes.plot(np.arange(1, len(line) + 1), line, label=f"MoE layer {number}", lw=1.2)
        else:
            axes.plot(np.arange(1, len(lines) + 1), lines.mean(axis=1), label=name)
    axes.axhline(dense, color="grey", lw=0.8, ls=":", label="a dense model")
    axes.set(xlabel="model evaluation, from noise to data", ylabel="experts per token, C_infer")
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False, fontsize=8)
    return figure


def classes_figure(results: Result | Sequence[Result], names: Sequence[str]) -> Figure:
    """The hardest and the easiest classes of results together, with their images.

    Args:
        results: of a model of classes.
        names: of the classes.

    Raises:
        UserError: fewer than two classes, or a model without experts.
    """
    results = [results] if isinstance(results, Result) else list(results)
    labels = np.concatenate([result.wanted for result in results])
    if labels.dtype.kind not in "iu" or len(set(labels)) < 2:
        raise UserError("classes: samples of at least two classes are wanted")
    spent = np.concatenate([_routing(result).spent() for result in results])
    images = np.concatenate([result.images for result in results])
    means = [
        spent[labels == k].mean() if (labels == k).any() else np.nan for k in range(len(names))
    ]
    return class_figure(np.array(means), names, labels, images)


def capacity_lines(capacity: np.ndarray) -> np.ndarray:
    """(T, L) experts per token, the mean over samples and the halves that were computed.

    Args:
        capacity: (T, 2, L, N), NaN where a half was not computed.
    """
    return np.nanmean(capacity, axis=(1, 3))


def _routing(result: Result) -> object:
    if result.routing is None:
        raise UserError("routing: the model has no experts, so that there is nothing to draw")
    return result.routing


def _numbers(result: Result, layer: int | None) -> np.ndarray:
    """(T, N, S)."""
    routing = _routing(result)
    if layer is not None and not 0 <= layer < len(routing.chosen):
        raise UserError(f"layer: {layer} is not allowed; allowed: 0 ... {len(routing.chosen) - 1}")
    numbers = routing.numbers(layer)
    if numbers is None:
        raise UserError("layer: it keeps no plan of its tokens, so that it has no map")
    return numbers
