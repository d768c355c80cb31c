"""Figures of what `sampling.pipeline` returns.

Shapes: T evaluations, L layers, N samples, S tokens of an image.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from core.errors import UserError
from evaluations.figures import class_figure
from evaluations.overlay import COLOURS, overlay
from sampling.grid import image_grid
from sampling.pipeline import Result

SIDE = 1.75
"""Inches of a picture."""

SMALL = 0.7
"""Inches of a picture among many."""


def images_figure(results: Result | Mapping[str, Result], columns: int = 10) -> Figure:
    """The images of a result in rows, or those of several, each under its name.

    Args:
        results: one, or several by name.
        columns: images in a row.
    """
    named = results if isinstance(results, Mapping) else {"": results}
    grids = [
        image_grid(torch.from_numpy(r.images), min(columns, len(r.images))).numpy()
        for r in named.values()
    ]
    pixels = next(iter(named.values())).images.shape[1]
    heights = [SMALL * len(grid) / pixels for grid in grids]
    width = SMALL * max(grid.shape[1] for grid in grids) / pixels
    size = (width, sum(heights) + (0.3 * len(grids) if "" not in named else 0))
    figure = Figure(figsize=size, layout="constrained")
    rows = figure.subplots(len(grids), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, name, grid in zip(rows, named, grids, strict=True):
        axes.set_axis_off()
        axes.set_anchor("W")
        axes.set_title(name, fontsize=10, loc="left")
        axes.imshow(grid, interpolation="nearest")
    return figure


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


def load_figure(results: Result | Mapping[str, Result]) -> Figure:
    """Share of the tokens that each expert of each layer computes, a row for each result.

    Args:
        results: one, or several by name, of models with equally many layers.

    Raises:
        UserError: a model without experts, or a layer without plans.
    """
    named = results if isinstance(results, Mapping) else {"": results}
    loads = {name: expert_loads(result) for name, result in named.items()}
    rows, columns = len(loads), max(map(len, loads.values()))
    figure = Figure(figsize=(3.2 * columns, 1.6 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panels, (name, layers) in zip(grid, loads.items(), strict=True):
        for number, (axes, shares) in enumerate(zip(panels, layers, strict=True), 1):
            axes.bar(np.arange(1, len(shares) + 1), shares)
            axes.axhline(shares.mean(), color="grey", lw=0.8, ls=":")
            axes.set_title(f"{name}, MoE layer {number}".removeprefix(", "), fontsize=9)
            axes.set_xticks([])
    figure.supxlabel("experts; dotted: an even load", fontsize=9)
    figure.supylabel("share of tokens", fontsize=9)
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


def expert_loads(result: Result) -> np.ndarray:
    """(L, E) share of the tokens that each expert computes, over all evaluations and samples.

    Raises:
        UserError: a model without experts, or a layer without plans.
    """
    routing, loads = _routing(result), []
    for layer in range(len(routing.chosen)):
        _numbers(result, layer)
        loads.append(routing.experts(layer).mean(axis=(0, 1, 2)))
    return np.stack(loads)


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
