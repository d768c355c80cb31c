"""python -m data.scenes --out DIR

Write small scenes of one to four coloured handwritten digits with captions, without any download:
real scans of scikit-learn's digits in the quadrants of 32 x 32 RGB images, in the six tasks of
GenEval and with its own description of each scene. DIR/train has scans of the training split,
DIR/val others; some digits never stand in some colours or relations in DIR/train, and
DIR/prompts.jsonl asks for these and for the rest.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from core.command_line import Parser, positive
from core.errors import command
from core.logging import get_logger, progress
from core.rng import generator
from data.digits import split
from data.making import made_alone, refuse_taken

SIZE = 32
DIGIT = 14
"""Side of a digit's square in a quadrant of 16."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {"six": "sixes"}
"""The others take an s."""

PALETTE = {
    "red": (230, 40, 40),
    "orange": (255, 150, 30),
    "yellow": (245, 240, 60),
    "green": (50, 200, 70),
    "cyan": (60, 220, 230),
    "blue": (60, 90, 250),
    "purple": (160, 60, 220),
    "white": (250, 250, 250),
}
"""RGB of each colour's brightest pixel; the ground is black."""

RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
"""Where the first of two stands, seen from the second: rows and columns of quadrants."""

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
METADATA = "metadata.jsonl"
PROMPTS = "prompts.jsonl"


@dataclass
class Scene:
    """What a caption asks for, in GenEval's schema.

    Attributes:
        tag: one of TAGS.
        prompt: the caption.
        include: objects with `class` and `count`, and perhaps `color` and `position`, a relation
            to an earlier one and its index.
        exclude: objects of which there must be fewer.
        unseen: whether the training scenes have no such combination.
    """

    tag: str
    prompt: str
    include: list[dict]
    exclude: list[dict] = field(default_factory=list)
    unseen: bool = False


@dataclass(frozen=True)
class Placed:
    """A digit of an image: its class, colour, and quadrant (row, column)."""

    digit: str
    color: str
    quadrant: tuple[int, int]


def unseen_color(digit: str, color: str) -> bool:
    """Whether a digit never has this colour in training: one colour of each digit."""
    return list(PALETTE).index(color) == DIGITS.index(digit) % len(PALETTE)


def unseen_relation(digit: str, relation: str) -> bool:
    """Whether a digit never stands so to another one in training: one relation of each digit."""
    return list(RELATIONS).index(relation) == DIGITS.index(digit) % len(RELATIONS)


class Draw:
    """Random choices by one generator."""

    def __init__(self, seed: int, purpose: str, index: int):
        self.generator = generator(seed, purpose, index)

    def below(self, count: int) -> int:
        """A whole number from 0 to `count` - 1."""
        return int(torch.randint(count, (1,), generator=self.generator))

    def of(self, items: tuple | list) -> object:
        """One of `items`."""
        return items[self.below(len(items))]

    def two(self, items: tuple | list) -> tuple[object, object]:
        """Two different ones."""
        first = self.below(len(items))
        second = (first + 1 + self.below(len(items) - 1)) % len(items)
        return items[first], items[second]


def _single(draw: Draw) -> Scene:
    digit = draw.of(DIGITS)
    return Scene("single_object", f"{_a(digit)}", [{"class": digit, "count": 1}])


def _two(draw: Draw) -> Scene:
    digits = draw.two(DIGITS)
    include = [{"class": digit, "count": 1} for digit in digits]
    return Scene("two_object", f"{_a(digits[0])} and {_a(digits[1])}", include)


def _counting(draw: Draw) -> Scene:
    digit, count = draw.of(DIGITS), 2 + draw.below(3)
    prompt = f"{NUMBERS[count]} {PLURALS.get(digit, f'{digit}s')}"
    exclude = [{"class": digit, "count": count + 1}]
    return Scene("counting", prompt, [{"class": digit, "count": count}], exclude)


def _colors(draw: Draw) -> Scene:
    digit, color = draw.of(DIGITS), draw.of(tuple(PALETTE))
    include = [{"class": digit, "count": 1, "color": color}]
    return Scene("colors", _a(f"{color} {digit}"), include, unseen=unseen_color(digit, color))


def _position(draw: Draw) -> Scene:
    first, second = draw.two(DIGITS)
    relation = draw.of(tuple(RELATIONS))
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    include = [
        {"class": second, "count": 1},
        {"class": first, "count": 1, "position": [relation, 0]},
    ]
    prompt = f"{_a(first)} {relation} {_a(second)}"
    unseen = unseen_relation(first, relation) or unseen_relation(second, inverse[relation])
    return Scene("position", prompt, include, unseen=unseen)


def _attributes(draw: Draw) -> Scene:
    digits, colors = draw.two(DIGITS), draw.two(tuple(PALETTE))
    pairs = list(zip(digits, colors, strict=True))
    include = [{"class": digit, "count": 1, "color": color} for digit, color in pairs]
    words = [_a(f"{color} {digit}") for digit, color in pairs]
    unseen = any(unseen_color(digit, color) for digit, color in pairs)
    return Scene("color_attr", " and ".join(words), include, unseen=unseen)


TASKS: dict[str, Callable[[Draw], Scene]] = dict(
    zip(TAGS, (_single, _two, _counting, _colors, _position, _attributes), strict=True)
)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def scene(seed: int, purpose: str, index: int, seen_only: bool) -> Scene:
    """The scene of an index, a function of its arguments; its task is index mod 6.

    Args:
        seed: of all scenes.
        purpose: such as `train`.
        index: of the scene.
        seen_only: leave out the combinations that training does not have.
    """
    draw = Draw(seed, f"scene {purpose}", index)
    while True:
        found = TASKS[TAGS[index % len(TAGS)]](draw)
        if not (seen_only and found.unseen):
            return found


def relations(first: tuple[int, int], second: tuple[int, int]) -> set[str]:
    """The relations of something in one quadrant to something in another one."""
    rows, columns = (a - b for a, b in zip(first, second, strict=True))
    names = {step: name for name, step in RELATIONS.items()}
    return {names[step] for step in ((rows, 0), (0, columns)) if any(step)}


def is_seen(placed: list[Placed]) -> bool:
    """Whether training may have these digits in these colours and relations."""
    pairs = [(one, other) for one in placed for other in placed if one.digit != other.digit]
    related = (
        unseen_relation(one.digit, relation)
        for one, other in pairs
        for relation in relations(one.quadrant, other.quadrant)
    )
    return not any(unseen_color(one.digit, one.color) for one in placed) and not any(related)


def arrange(asked: Scene, draw: Draw, seen_only: bool) -> list[Placed]:
    """Digits in quadrants as a scene asks for them; what it leaves open is drawn.

    Args:
        asked: the scene; one that training may have, for `seen_only`.
        draw: makes the choices.
        seen_only: leave out the combinations that training does not have.
    """
    while True:
        placed = _arranged(asked, draw)
        if is_seen(placed) or not seen_only:
            return placed


def _arranged(asked: Scene, draw: Draw) -> list[Placed]:
    quadrants = [(row, column) for row in (0, 1) for column in (0, 1)]
    wanted = [item for item in asked.include for _ in range(item["count"])]
    if asked.tag == "position":
        rows, columns = RELATIONS[wanted[1]["position"][0]]
        along = draw.below(2)  # where on the other axis
        second = (int(rows < 0), along) if rows else (along, int(columns < 0))
        places = [second, (second[0] + rows, second[1] + columns)]
    else:
        order = torch.randperm(4, generator=draw.generator).tolist()
        places = [quadrants[i] for i in order[: len(wanted)]]
    colors = [item.get("color") or draw.of(tuple(PALETTE)) for item in wanted]
    pairs = zip(wanted, colors, places, strict=True)
    return [Placed(item["class"], color, place) for item, color, place in pairs]


def paint(placed: list[Placed], scans: dict[str, np.ndarray], draw: Draw) -> Image.Image:
    """The image of a scene.

    Args:
        placed: its digits.
        scans: (N, 8, 8) of each digit, values 0 ... 16.
        draw: which scan, and where in its quadrant.
    """
    canvas = np.zeros((SIZE, SIZE, 3), np.float32)
    for one in placed:
        scan = scans[one.digit][draw.below(len(scans[one.digit]))]
        grey = Image.fromarray((scan / 16.0).astype(np.float32))
        ink = np.asarray(grey.resize((DIGIT, DIGIT), Image.Resampling.BICUBIC)).clip(0, 1)
        spare = SIZE // 2 - DIGIT + 1
        top = one.quadrant[0] * SIZE // 2 + draw.below(spare)
        left = one.quadrant[1] * SIZE // 2 + draw.below(spare)
        color = np.array(PALETTE[one.color], np.float32)
        canvas[top : top + DIGIT, left : left + DIGIT] = ink[..., None] * color
    return Image.fromarray(np.rint(canvas).astype(np.uint8))


def scans_of(val: bool) -> dict[str, np.ndarray]:
    """Real scans (N, 8, 8) of each digit, of the training split or of the held-out one."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = split(digits.target) == val
    return {
        name: digits.images[chosen & (digits.target == label)] for label, name in enumerate(DIGITS)
    }


def write_scenes(out: str | Path, train: int, val: int, prompts: int, seed: int = 0) -> Counter:
    """Write `out`/train and `out`/val with METADATA, and `out`/PROMPTS.

    Args:
        out: folder to make.
        train, val: scenes in each.
        prompts: to sample for each of the six tasks.
        seed: of every draw.

    Returns:
        How many scenes, or prompts, there are of each.

    Raises:
        UserError: `out` holds something, is being made, or cannot be written.
    """
    out = Path(out)
    refuse_taken(out, "holds something else")
    with made_alone(out) as folder:
        for name, count in (("train", train), ("val", val)):
            _write_split(folder / name, name, count, seed)
        asked = [scene(seed, "prompts", i, seen_only=False) for i in range(prompts * len(TAGS))]
        lines = [json.dumps(asdict(one)) for one in asked]
        (folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines))
    counts = Counter(train=train, val=val, prompts=len(asked))
    get_logger("data.scenes").info("%s: %s", out, dict(counts))
    return counts


def _write_split(folder: Path, name: str, count: int, seed: int) -> None:
    """Images and METADATA of the training or the held-out scenes."""
    folder.mkdir()
    scans, seen_only = scans_of(name == "val"), name == "train"
    with (folder / METADATA).open("w") as file:
        for index in progress(range(count), None, f"{name} scenes", "img", leave=False):
            asked = scene(seed, name, index, seen_only)
            draw = Draw(seed, f"picture {name}", index)
            picture = paint(arrange(asked, draw, seen_only), scans, draw)
            picture.save(folder / f"{index:06d}.png")
            about = asdict(asked)
            entry = {"file_name": f"{index:06d}.png", "text": about.pop("prompt")} | about
            file.write(json.dumps(entry) + "\n")


@command
def main() -> None:
    """Parse the command line and write the scenes."""
    parser = Parser("data.scenes", __doc__)
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--train", type=positive, default=12_000, help="training scenes")
    parser.add_argument("--val", type=positive, default=1_200, help="held-out scenes")
    parser.add_argument("--prompts", type=positive, default=50, help="of each of the six tasks")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    flags = vars(parser.parse_args())
    write_scenes(**flags)


if __name__ == "__main__":
    main()
