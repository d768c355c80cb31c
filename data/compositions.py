"""What scenes of digits can be asked for, in the six tasks of GenEval and in its schema.

Some digits are never asked for, nor shown, in some colours or relations where `seen_only` is set:
training has no such scene, and scores tell these combinations apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from core.rng import generator

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
    """Whether a digit never stands so to another one in training: a relation of the first four."""
    return list(RELATIONS).index(relation) == DIGITS.index(digit)


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
    (inverse,) = (name for name, step in RELATIONS.items() if _opposite(step, RELATIONS[relation]))
    include = [
        {"class": second, "count": 1},
        {"class": first, "count": 1, "position": [relation, 0]},
    ]
    prompt = f"{_a(first)} {relation} {_a(second)}"
    unseen = unseen_relation(first, relation) or unseen_relation(second, inverse)
    return Scene("position", prompt, include, unseen=unseen)


def _opposite(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return all(a == -b for a, b in zip(one, other, strict=True))


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
    vowel = words[0] in "aeiou" and not words.startswith("one")  # spoken, it begins with a w
    return f"{'an' if vowel else 'a'} {words}"


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
