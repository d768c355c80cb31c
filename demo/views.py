"""Pieces of the page: pictures as small PNGs within the page, curves as SVG. No files, no network.

Shapes: N samples, H and W of the image, S tokens of it, T evaluations.
"""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from evaluations.overlay import colours, overlay

LINES = ("#e4572e", "#2e86ab", "#3ca370", "#a26ee0", "#e0a030", "#d1495b", "#1f9e9e", "#7a8b99")
"""Colours of lines and bars that can be told apart on light and on dark ground."""
WIDTH, HEIGHT = 520, 210
LEFT, RIGHT, TOP, BOTTOM = 34, 12, 10, 22
"""Of a curve, in its own units."""


def text(words: object) -> str:
    """Words of somebody else as they are, for HTML and for Gradio's templates, which know `${`."""
    escaped = html.escape(str(words))
    return escaped.replace("$", "&#36;").replace("{", "&#123;").replace("}", "&#125;")


def png(picture: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as the address of an image."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture(image: np.ndarray, kind: str, title: str = "") -> str:
    """An image (H, W, 3) whose pixels stay square, however large it is shown."""
    return (
        f'<img class="dm-px {kind}" src="{png(image)}" alt="{text(title)}" title="{text(title)}">'
    )


def gallery(
    images: np.ndarray,
    maps: np.ndarray | None,
    names: Sequence[str],
    top: float,
    notes: Sequence[str] | None = None,
) -> str:
    """A card for each sample: the image, and where its computation goes beside it.

    Args:
        images: (N, H, W, 3) uint8.
        maps: (N, S) experts of each token, or None.
        names: under the cards.
        top: where the colours end.
        notes: behind the names.
    """
    over = [None] * len(images) if maps is None else overlay(images, maps, top)
    cards = []
    for number, (image, colour) in enumerate(zip(images, over, strict=True)):
        pair = picture(image, "dm-image", names[number])
        if colour is not None:
            mean = f"{names[number]}: {maps[number].mean():.2f} experts per token"
            pair += picture(colour, "dm-map", mean)
        note = f' <span class="dm-note">{text(notes[number])}</span>' if notes else ""
        cards.append(
            f'<figure class="dm-card"><div class="dm-pair">{pair}</div>'
            f"<figcaption>{text(names[number])}{note}</figcaption></figure>"
        )
    return f'<div class="dm-cards">{"".join(cards)}</div>'


def legend(top: float) -> str:
    """The colour scale of the maps, with numbers."""
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*c) for c in colours(np.linspace(0, 1, 17), 1.0))
    marks = [0.0, *(m for m in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0) if m < 0.93 * top)]
    if len(marks) > 5:
        marks = [m for m in marks if m == int(m)]
    ticks = "".join(f'<i style="left:{100 * m / top:.1f}%">{m:g}</i>' for m in marks)
    ticks += f'<i style="left:100%">{top:g}+</i>'
    return (
        f'<div class="dm-legend"><span>experts per token</span><div class="dm-scale">'
        f'<div class="dm-bar" style="background:linear-gradient(90deg, {stops})"></div>'
        f'<div class="dm-ticks">{ticks}</div></div></div>'
    )


def bar(done: int, total: int, words: str) -> str:
    """How far a generation is."""
    share = 100 * min(1.0, done / max(total, 1))
    return (
        f'<div class="dm-progress"><div style="width:{share:.1f}%"></div></div>'
        f'<p class="dm-words">{text(words)}</p>'
    )


def words(sentence: str, kind: str = "dm-words") -> str:
    """A sentence."""
    return f'<p class="{kind}">{text(sentence)}</p>'


def tiles(facts: Mapping[str, str]) -> str:
    """Large figures over what they mean."""
    shown = ((text(value), text(name)) for name, value in facts.items())
    cells = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in shown)
    return f'<div class="dm-tiles">{cells}</div>'


def curve(
    lines: Mapping[str, np.ndarray],
    total: int,
    dense: float | None = 1.0,
    label: str = "experts per token",
    at: int | None = None,
) -> str:
    """Lines over the evaluations as SVG.

    Args:
        lines: (up to T,) by name.
        total: T of the axis.
        dense: experts per token that cost as much as a dense layer: a dotted line; None for none.
        label: of the upward axis.
        at: evaluation that is looked at, from 1.
    """
    highest = max([dense or 0.0, *(float(np.nanmax(y)) for y in lines.values() if len(y))])
    high = _round_up(max(1.08 * highest, 1e-3))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - 1) / max(total - 1, 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / high

    parts = [_axes(x, y, total, high)]
    if dense is not None:
        parts.append(_line("dm-dense", LEFT, WIDTH - RIGHT, y(dense), y(dense)))
        parts.append(_words(LEFT + 4, y(dense) + 13, "start", "as a dense layer"))
    if at is not None:
        parts.append(_line("dm-at", x(at), x(at), TOP, y(0)))
    keys = []
    for number, (name, values) in enumerate(lines.items()):
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values, 1))
        colour = LINES[number % len(LINES)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        keys.append(f'<span><i style="background:{colour}"></i>{text(name)}</span>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">'
    return (
        f'<div class="dm-curve"><p class="dm-words">{text(label)} at each evaluation, from noise '
        f'to data</p>{svg}{"".join(parts)}</svg><div class="dm-keys">{"".join(keys)}</div></div>'
    )


Place = Callable[[float], float]
"""Where a value lies on the page, in units of the curve."""


def _axes(x: Place, y: Place, total: int, high: float) -> str:
    """Lines and numbers at the sides of a curve."""
    parts = []
    for value in np.linspace(0, high, 5):
        parts.append(_line("dm-grid", LEFT, WIDTH - RIGHT, y(value), y(value)))
        parts.append(_words(LEFT - 6, y(value) + 4, "end", f"{value:.3g}"))
    for step in sorted({1, max(total // 2, 1), total}):
        parts.append(_words(x(step), HEIGHT - 6, "middle", str(step)))
    return "".join(parts)


def _line(kind: str, x1: float, x2: float, y1: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _words(x: float, y: float, anchor: str, shown: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def ranking(
    values: Sequence[float], names: Sequence[str], images: Sequence[Sequence[np.ndarray]]
) -> str:
    """Bars from the hardest to the easiest, with pictures of each.

    Args:
        values: C_infer of each.
        names: of them.
        images: (H, W, 3) uint8, some of each.
    """
    order = sorted(range(len(values)), key=lambda i: -values[i])
    low, high = min(values), max(values)
    start = low - 0.12 * max(high - low, 1e-9)  # classes differ by a few per cent
    rows = [f'<p class="dm-words">bars begin at {start:.3f} experts per token</p>']
    for place, i in enumerate(order):
        length = 100 * (values[i] - start) / max(high - start, 1e-9)
        colour = LINES[0] if place < len(order) / 2 else LINES[1]
        shown = "".join(picture(image, "dm-small", names[i]) for image in images[i])
        rows.append(
            f'<div class="dm-row"><span class="dm-name">{text(names[i])}</span>'
            f'<span class="dm-strip">{shown}</span><span class="dm-length"><i style="width:'
            f'{length:.1f}%;background:{colour}"></i></span><b>{values[i]:.3f}</b></div>'
        )
    return f'<div class="dm-ranking">{"".join(rows)}</div>'


def lens(images: Sequence[np.ndarray], masks: Sequence[np.ndarray], titles: Sequence[str]) -> str:
    """Tokens of one expert over images (rows) and evaluations (columns).

    Args:
        images: (N, H, W, 3) uint8 at each of the evaluations.
        masks: (N, S) bool at each of them.
        titles: of the columns.
    """
    columns = [spotlight(shown, taken) for shown, taken in zip(images, masks, strict=True)]
    head = "".join(f"<span>{text(title)}</span>" for title in titles)
    cells = "".join(
        picture(column[row], "dm-spot") for row in range(len(images[0])) for column in columns
    )
    style = f"grid-template-columns:repeat({len(columns)}, minmax(0, 1fr))"
    return f'<div class="dm-lens" style="{style}">{head}{cells}</div>'


def spotlight(images: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) uint8 whose tokens `taken` (N, S) are lit, the others dimmed."""
    N, H, W, _ = images.shape
    side = round(taken.shape[1] ** 0.5)
    cells = taken.reshape(N, side, side, 1)
    lit = cells.repeat(H // side, axis=1).repeat(W // side, axis=2)
    grey = images.mean(axis=-1, keepdims=True, dtype=np.float32)
    light = np.array([255, 176, 32], np.float32)
    bright = 0.45 * light + 0.55 * grey
    dim = 0.35 * grey + np.array([18, 20, 40], np.float32)
    return np.where(lit, bright, dim).clip(0, 255).astype(np.uint8)


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(value))
    steps = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)
    return float(next(s for s in steps if s * power >= value * (1 - 1e-9)) * power)
