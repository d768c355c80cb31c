"""Pictures with the prompts that they were made from under them."""

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sampling.grid import image_grid

SIDE = 96
"""Pixels that the side of an image has at least; smaller ones are shown by larger pixels."""
COLUMNS = 4
"""Images of a prompt in a row."""
GAP = 12
FONT_SIZE = 15


def captioned_grid(
    images: Tensor, texts: Sequence[str], each: int, columns: int | None = None
) -> Tensor:
    """Groups of images (N, H, W, 3) uint8 with a text under each: one picture (H', W', 3).

    Args:
        images: in the order of the texts; the last group may have fewer.
        texts: of the groups, as many as there are.
        each: images of a group.
        columns: groups in a row; by default as many as make the picture about square.
    """
    zoom = max(1, SIDE // images.shape[2])
    groups = [
        _group(part, text, zoom) for part, text in zip(images.split(each), texts, strict=True)
    ]
    width, height = max(g.width for g in groups), max(g.height for g in groups)
    columns = columns or max(1, round((len(groups) * height / width) ** 0.5))
    rows = math.ceil(len(groups) / columns)
    size = columns * (width + GAP) + GAP, rows * (height + GAP) + GAP
    sheet = Image.new("RGB", size, "white")
    for number, group in enumerate(groups):
        row, column = divmod(number, columns)
        sheet.paste(group, (GAP + column * (width + GAP), GAP + row * (height + GAP)))
    return torch.from_numpy(np.array(sheet))


def _group(images: Tensor, text: str, zoom: int) -> Image.Image:
    """Images of one prompt, and the prompt under them."""
    larger = images.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    picture = Image.fromarray(image_grid(larger, min(COLUMNS, len(images))).numpy())
    font = ImageFont.load_default(FONT_SIZE)
    letters = max(8, int(picture.width / font.getlength("n")))
    lines = textwrap.wrap(text, letters) or [""]
    line = FONT_SIZE + 3
    sheet = Image.new("RGB", (picture.width, picture.height + 4 + line * len(lines)), "white")
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for number, words in enumerate(lines):
        left = (picture.width - font.getlength(words)) / 2
        draw.text((left, picture.height + 4 + number * line), words, "black", font)
    return sheet
