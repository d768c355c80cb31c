"""What is drawn or recorded, in pieces of the page.

Shapes: N samples, H and W of the image, T evaluations, L layers.
"""

from collections.abc import Sequence

import numpy as np

from core.errors import UserError
from demo import views
from demo.asked import whole
from demo.drawn import Drawn, Progress, tokens_of

LENS_STEPS = 6
"""Evaluations that the lens shows side by side."""
LENS_IMAGES = 8
MOST_LINES = 6
"""Layers that have a line of their own."""


def under_way(progress: Progress) -> tuple[str, str]:
    """Pictures and curve of a generation so far."""
    words = f"evaluation {progress.done} of {progress.total}"
    bar = views.bar(progress.done, progress.total, words)
    pictures = views.gallery(progress.images, progress.maps, progress.names, progress.top)
    if not progress.lines:
        return bar + pictures, ""
    lines = np.stack(progress.lines)  # (t, L)
    line = views.curve(_named(lines), progress.total, 1 / progress.cost)
    return bar + views.legend(progress.top) + pictures, line


def pictures(drawn: Drawn, step: object, layer: object) -> str:
    """All samples at an evaluation, and where its computation went.

    Raises:
        UserError: there is no such step or layer.
    """
    maps, images = drawn.map_at(step, layer), drawn.image_at(step)
    step, layer = int(step), int(layer)
    if len(drawn.steps) > 1 and step == drawn.evaluations:
        images = drawn.images
    where = "mean over layers" if layer == 0 else f"MoE layer {layer} of {drawn.layers}"
    done = "" if len(drawn.steps) > 1 else ", over the finished images"
    words = views.words(f"evaluation {step} of {drawn.evaluations} · {where}{done}")
    notes = None if drawn.spent is None else [f"C {spent:.2f}" for spent in drawn.spent]
    if maps is None:
        why = "a dense model: every token costs the same" if not drawn.maps else "no map here"
        return words + views.words(why) + views.gallery(images, None, drawn.names, 1.0, notes)
    even = "" if np.ptp(maps) > 0 else views.words(_evenly(maps))
    cards = views.gallery(images, maps, drawn.names, drawn.top, notes)
    return words + views.legend(drawn.top) + even + cards


def curves(drawn: Drawn, step: object = None) -> str:
    """Experts per token over the evaluations, of the mean and of each layer."""
    if drawn.lines.shape[1] == 0:
        return ""
    at = None if step is None else whole("step", step, 1, drawn.evaluations)
    return views.curve(_named(drawn.lines), len(drawn.lines), 1 / drawn.cost, at=at)


def facts(drawn: Drawn) -> str:
    """The figures of a generation."""
    if drawn.spent is None:
        found = {"experts: this is a dense model": "none"}
    else:
        mean = float(np.mean(drawn.spent))
        found = {"experts per token, C_infer": f"{mean:.3f}", **saved(mean, drawn.cost)}
        hardest = int(np.argmax(drawn.spent))
        if np.ptp(drawn.spent) > 1e-3:
            found["most, sample " + str(hardest + 1)] = f"{drawn.spent[hardest]:.3f}"
    if drawn.rate is not None:
        found["steps per second, drawn and shown"] = f"{drawn.rate:.1f}"
    return views.tiles(found)


def saved(mean: float, cost: float) -> dict[str, str]:
    """What the experts' matrix products cost beside those of dense layers (C_infer = 1)."""
    change = 100 * (mean * cost - 1)
    word = "spent" if change > 0 else "saved"
    about = f"expert FLOPs {word} against dense"
    if cost != 1:
        about += f"; an expert is {cost:.2g} of a dense layer"
    return {about: f"{abs(change):.1f} %"}


def expert_lens(drawn: Drawn, layer: object, expert: object) -> str:
    """The tokens of one expert over samples and evaluations.

    Raises:
        UserError: there is no such layer or expert.
    """
    T = drawn.evaluations
    steps = np.unique(np.linspace(1, T, min(LENS_STEPS, T)).round().astype(int)).tolist()
    masks = [tokens_of(drawn, layer, expert, step)[:LENS_IMAGES] for step in steps]
    layer, expert = int(layer), int(expert)
    shares = drawn.routing.experts(layer - 1)[..., expert - 1].mean(axis=(1, 2))  # (T,)
    images = [drawn.image_at(step)[:LENS_IMAGES] for step in steps]
    sentence = (
        f"Expert {expert} of layer {layer} computed {100 * shares.mean():.1f} % of the tokens: "
        f"{100 * shares[0]:.1f} % at the first evaluation, {100 * shares[-1]:.1f} % at the last."
    )
    name = {f"share of the tokens that expert {expert} computed": shares}
    line = views.curve(name, T, dense=None, label="share of tokens")
    grid = views.lens(images, masks, [f"evaluation {step}" for step in steps])
    return views.words(sentence, "dm-lead") + grid + line


def ranked(names: Sequence[str], spent: Sequence[np.ndarray], images: Sequence[np.ndarray]) -> str:
    """Classes or prompts from the hardest to the easiest.

    Args:
        names: of them.
        spent: (n,) C_infer of the samples of each.
        images: (n, H, W, 3) uint8 of each.
    """
    means = [float(np.mean(one)) for one in spent]
    hard, easy = (names[pick(means)] for pick in (np.argmax, np.argmin))
    sentence = (
        f"Hardest: {hard}, {max(means):.3f} experts per token. Easiest: {easy}, {min(means):.3f}."
    )
    return views.words(sentence, "dm-lead") + views.ranking(means, names, images)


def side_by_side(drawn: Sequence[Drawn], titles: Sequence[str]) -> str:
    """Several generations of the same noise, one under the other, and their curves together."""
    parts, top = [], max(one.top for one in drawn)
    if any(one.lines.shape[1] for one in drawn):
        parts.append(views.legend(top))  # one scale for all
    for one, title in zip(drawn, titles, strict=True):
        mean = one.maps[0].mean(axis=0) if one.maps and one.maps[0] is not None else None
        spent = "" if one.spent is None else f": {float(np.mean(one.spent)):.3f} experts per token"
        parts.append(views.words(f"{title}{spent}", "dm-section"))
        notes = None if one.spent is None else [f"C {value:.2f}" for value in one.spent]
        parts.append(views.gallery(one.images, mean, one.names, top, notes))
    lines = {
        title: one.cost * one.lines.mean(axis=1)
        for one, title in zip(drawn, titles, strict=True)
        if one.lines.shape[1]
    }
    longest = max(one.evaluations for one in drawn)
    label = "cost of the experts, in dense layers,"
    return "".join(parts) + (views.curve(lines, longest, label=label) if lines else "")


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference of pixels (..., 3) uint8, of 255."""
    return float(np.abs(one.astype(np.float32) - other.astype(np.float32)).mean())


def check_drawn(drawn: Drawn | None) -> Drawn:
    """What was generated.

    Raises:
        UserError: nothing yet.
    """
    if drawn is None:
        raise UserError("nothing was generated yet: press Generate first")
    return drawn


def _named(lines: np.ndarray) -> dict[str, np.ndarray]:
    """Lines (t, L) of a curve by name."""
    found = {"mean over layers": lines.mean(axis=1)}
    if 1 < lines.shape[1] <= MOST_LINES:
        found |= {f"layer {i}": line for i, line in enumerate(lines.T, 1)}
    return found


def _evenly(maps: np.ndarray) -> str:
    return (
        f"Every token has {maps.flat[0]:g} experts in this system: what differs is which ones, "
        "as the expert lens shows."
    )
