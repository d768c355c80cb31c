"""python -m demo.gif RUN --out docs/demo.gif [--classes 3,8,0,5,2,6] [--seed 0] ...

An animation of a denoising: the images as the model sees them, the experts at work for each token
under them, and experts per token over the steps.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from core.command_line import Parser, file_to_write, natural, positive
from core.errors import UserError, command
from core.files import complete_file
from core.logging import get_logger
from demo.asked import Ask
from demo.drawn import scale_of
from evaluations.overlay import colours, overlay
from evaluations.plots import capacity_lines
from sampling.pipeline import Result, Step, load

GAP, CURVE, HEAD = 8, 120, 22
GROUND, INK, SOFT, LINE = "#0f131b", "#eef1f6", "#8b95a7", "#ff7a3d"


def frames(steps: list[Step], result: Result, top: float, side: int) -> list[Image.Image]:
    """A picture of each evaluation, and the finished images.

    Args:
        steps: of a stream.
        result: of the same.
        top: experts per token at the end of the colours.
        side: of an image, in pixels.
    """
    lines = capacity_lines(result.routing.capacity).mean(axis=1)  # (T,)
    return [
        _frame(step, result.images if step is steps[-1] else step.images, lines, top, side)
        for step in steps
    ]


def _frame(step: Step, images: np.ndarray, lines: np.ndarray, top: float, side: int) -> Image.Image:
    zoom = max(1, side // images.shape[1])
    side = zoom * images.shape[1]
    width = GAP + len(images) * (side + GAP)
    sheet = Image.new("RGB", (width, HEAD + 2 * (side + GAP) + CURVE + GAP), GROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    words = f"step {step.number + 1} of {len(lines)}"
    draw.text((GAP, 5), words, INK, font)
    _legend(sheet, draw, font, width, top)
    maps = overlay(images, step.routing.numbers()[0], top)
    for row, pictures in enumerate((images, maps)):
        for column, picture in enumerate(pictures):
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (GAP + column * (side + GAP), HEAD + GAP + row * (side + GAP)))
    _curve(draw, font, lines, step.number, (HEAD + 2 * (side + GAP) + GAP, width))
    return sheet


def _legend(sheet: Image.Image, draw, font, width: int, top: float) -> None:
    scale = colours(np.linspace(0, 1, 120)[None].repeat(8, 0), 1.0)
    left = width - GAP - 120 - 30
    draw.text((left - 8, 5), "experts per token  0", SOFT, font, anchor="ra")
    sheet.paste(Image.fromarray(scale), (left, 8))
    draw.text((left + 126, 5), f"{top:g}+", SOFT, font)


def _curve(draw, font, lines: np.ndarray, number: int, place: tuple[int, int]) -> None:
    """Experts per token up to an evaluation, against a dense model."""
    (above, width), high = place, 1.15 * max(1.0, float(lines.max()))
    left, right, below = GAP + 34, width - GAP - 42, above + CURVE - 18

    def at(index: int, value: float) -> tuple[float, float]:
        x = left + (right - left) * index / max(len(lines) - 1, 1)
        return x, below - (below - above - 6) * value / high

    draw.line([at(0, 0), at(len(lines) - 1, 0)], SOFT)
    for index in range(0, 2 * len(lines), 2):  # dotted
        x = left + (right - left) * index / (2 * len(lines))
        draw.line([x, at(0, 1)[1], x + 4, at(0, 1)[1]], SOFT)
    draw.text((right + 6, at(0, 1)[1] - 7), "dense", SOFT, font)
    for value in (0, 1):
        draw.text((left - 6, at(0, value)[1] - 7), f"{value}", SOFT, font, anchor="ra")
    draw.text((left, below + 3), "noise", SOFT, font)
    draw.text((right, below + 3), "data", SOFT, font, anchor="ra")
    points = [at(index, value) for index, value in enumerate(lines[: number + 1])]
    if len(points) > 1:
        draw.line(points, LINE, 2)
    x, y = points[-1]
    draw.ellipse([x - 3, y - 3, x + 3, y + 3], LINE)
    draw.text((x + 3, y - 19), f"{lines[number]:.2f}", INK, font, anchor="ra")


def save(pictures: list[Image.Image], path: Path, pause: int) -> None:
    """Write an animation that stays on its last picture for a while.

    Args:
        pictures: in their order.
        path: of the GIF.
        pause: milliseconds of each.
    """
    colours_of_all = pictures[len(pictures) // 2].quantize(128, dither=Image.Dither.NONE)
    few = [one.quantize(palette=colours_of_all, dither=Image.Dither.NONE) for one in pictures]
    pauses = [pause] * (len(few) - 1) + [2500]
    with complete_file(path) as temporary:
        few[0].save(
            temporary, format="gif", save_all=True, append_images=few[1:], duration=pauses, loop=0,
            optimize=True,
        )  # fmt: skip


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("demo.gif", __doc__)
    add = parser.add_argument
    add("ckpt", metavar="RUN", help="run or checkpoint folder of a model of classes")
    add("--out", type=file_to_write, required=True, help="GIF to write")
    add("--classes", default="3,8,0,5,2,6", help="default 3,8,0,5,2,6")
    add("--seed", type=natural, default=0, help="of the noise; default 0")
    add("--steps", type=positive, help="default: the checkpoint's")
    add("--cfg-scale", type=float, help="guidance; default: the checkpoint's")
    add("--side", type=positive, default=96, help="pixels of an image; default 96")
    add("--pause", type=positive, default=90, help="milliseconds of a step; default 90")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Draw, and write the animation."""
    flags = parse_flags(argv)
    try:
        wanted = [int(word) for word in flags.classes.split(",")]
    except ValueError:
        raise UserError(f"--classes: {flags.classes!r} is no list such as 3,8") from None
    pipe = load(flags.ckpt)
    given = {"num_steps": flags.steps, "cfg_scale": flags.cfg_scale}
    given = {key: value for key, value in given.items() if value is not None}
    *steps, result = pipe.stream(wanted, seed=flags.seed, **given)
    if result.routing is None or result.routing.numbers() is None:
        raise UserError(f"{flags.ckpt}: has no experts, so that there is nothing to watch")
    top = scale_of(pipe, Ask(wanted, [], flags.seed))
    save(frames(steps, result, top, flags.side), flags.out, flags.pause)
    get_logger("demo.gif").info("%s: %d steps", flags.out, len(steps))


if __name__ == "__main__":
    main()
