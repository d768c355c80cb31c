"""Figures and overlays of what a pipeline returns."""

import io

import numpy as np
import pytest
from matplotlib import colormaps

from config.objective import SamplingConfig
from core.errors import UserError
from evaluations.overlay import colours, overlay
from evaluations.plots import (
    capacity_figure,
    classes_figure,
    images_figure,
    load_figure,
    overlay_figure,
)
from sampling.pipeline import Result
from sampling.recorder import Routing


def result(seed=0, routed=True, second=True):
    """Three samples of 16 tokens, 4 evaluations, 2 layers of 5 experts."""
    random = np.random.default_rng(seed)
    taken = random.random((2, 4, 3, 16, 5)) < 0.3
    capacity = np.stack([taken.sum(-1).mean(-1).transpose(1, 0, 2)] * 2, axis=1)
    if not second:
        capacity[:, 1] = np.nan
    chosen = [np.packbits(layer, axis=-1) for layer in taken]
    routing = Routing(np.arange(4) / 4, capacity, chosen, 5) if routed else None
    images = random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    return Result(images, routing, [0, 2, 2], seed, SamplingConfig(), 8)


def test_colours_are_matplotlibs_and_end_at_the_top():
    found = colours(np.array([0.0, 1.0, 2.0, 5.0]), top=2.0)
    wanted = [colormaps["inferno"](x)[:3] for x in (0, 128, 255, 255)]
    np.testing.assert_allclose(found, np.array(wanted) * 255, atol=0.5)


def test_an_overlay_colours_the_pixels_of_each_token():
    images = np.full((1, 4, 4, 3), 100, np.uint8)
    found = overlay(images, np.array([[0.0, 1.0, 2.0, 3.0]]), top=3.0, strength=0.5)
    for token, value in enumerate((0.0, 1.0, 2.0, 3.0)):
        row, column = divmod(token, 2)
        cell = found[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1, 3)
        wanted = 0.5 * colours(np.array(value), 3.0) + 50
        np.testing.assert_allclose(cell, np.tile(wanted, (4, 1)), atol=0.5)


def drawn(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getbuffer().nbytes


def test_maps_over_images():
    figure = overlay_figure(result(), steps=[0, 3], layer=1)
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 9
    numbers = result().routing.numbers(1)
    top = float(np.quantile([numbers[0], numbers[3]], 0.995))
    shown = panels[2].images[0].get_array()
    np.testing.assert_array_equal(shown, overlay(result().images, numbers[3], top)[0])
    assert figure.axes[-1].get_ylabel() == "experts per token"
    assert drawn(figure) > 1000
    assert len([axes for axes in overlay_figure(result()).axes if axes.images]) == 6


def test_images_in_rows_and_by_name():
    (axes,) = images_figure(result(), columns=2).axes
    shown = axes.images[0].get_array()
    assert shown.shape == (8 + 2 + 8, 8 + 2 + 8, 3)
    np.testing.assert_array_equal(shown[:8, :8], result().images[0])
    np.testing.assert_array_equal(shown[10:, :8], result().images[2])
    figure = images_figure({"one": result(0), "other": result(1)})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "other"]
    np.testing.assert_array_equal(figure.axes[1].images[0].get_array()[:, 20:], result(1).images[2])
    assert drawn(figure) > 1000


def test_load_of_each_expert():
    one, other = result(0), result(1)
    figure = load_figure({"one": one, "other": other})
    assert [axes.get_title() for axes in figure.axes] == [
        f"{name}, MoE layer {layer}" for name in ("one", "other") for layer in (1, 2)
    ]
    heights = [bar.get_height() for bar in figure.axes[3].containers[0]]
    assert heights == pytest.approx(other.routing.experts(1).mean(axis=(0, 1, 2)))
    total = sum(bar.get_height() for bar in figure.axes[0].containers[0])
    assert total == pytest.approx(one.routing.capacity[:, 0, 0].mean())  # experts per token
    assert load_figure(one).axes[0].get_title() == "MoE layer 1"
    assert drawn(figure) > 1000


@pytest.mark.parametrize("second", [True, False])
def test_capacity_over_the_steps(second):
    one, other = result(0, second=second), result(1, second=second)
    lines = capacity_figure({"one": one, "other": other}).axes[0].lines
    assert [line.get_label() for line in lines] == ["one", "other", "a dense model"]
    np.testing.assert_allclose(lines[0].get_ydata(), one.routing.capacity[:, 0].mean(axis=(1, 2)))
    layers = capacity_figure(one, by_layer=True).axes[0].lines
    np.testing.assert_allclose(layers[1].get_ydata(), one.routing.capacity[:, 0, 1].mean(axis=1))
    assert len(layers) == 3


def test_classes_side_by_side():
    figure = classes_figure([result(0), result(1)], ["zero", "one", "two"])
    bars = figure.axes[0].containers[0]
    spent = np.concatenate([result(0).routing.spent(), result(1).routing.spent()])
    labels = np.array([0, 2, 2, 0, 2, 2])
    means = sorted(spent[labels == k].mean() for k in (0, 2))
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(means)


@pytest.mark.parametrize(
    ("draw", "wanted"),
    [
        (lambda: overlay_figure(result(routed=False)), "no experts"),
        (lambda: capacity_figure(result(routed=False)), "no experts"),
        (lambda: load_figure(result(routed=False)), "no experts"),
        (
            lambda: overlay_figure(result(), layer=2),
            r"layer: 2 is not allowed; allowed: 0 \.\.\. 1",
        ),
        (lambda: overlay_figure(result(), steps=[4]), "step: 4 is not allowed"),
        (lambda: capacity_figure({"a": result(), "b": result()}, by_layer=True), "by_layer: 2"),
        (lambda: classes_figure(result(routed=False), ["a", "b", "c"]), "no experts"),
    ],
)
def test_what_cannot_be_drawn(draw, wanted):
    with pytest.raises(UserError, match=wanted):
        draw()
