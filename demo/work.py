"""What the buttons of the page do, without the page: inputs as they come, pieces of HTML out.

Every function checks all of its inputs, since anybody can post to a page; what is refused is a
`UserError`. Functions of long work are generators, and closing them ends the work.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from core.errors import UserError
from demo import show, views
from demo.asked import (
    LONGEST_PROMPT,
    OWN,
    Ask,
    Settings,
    ask_for,
    asked,
    class_title,
    one_of,
    samplers,
    thing,
    whole,
)
from demo.drawn import Drawn, Progress, draw
from sampling.pipeline import Pipeline

RULES, COMPANY, CHECKPOINTS = "two routing rules", "alone and in the batch", "all checkpoints"
MOST_ALONE = 4
"""Samples that are drawn once more each by itself."""
MOST_THINGS = 12
"""Classes or prompts of a comparison."""


class Studio:
    """The checkpoints of a page.

    Args:
        pipes: by the names that the page shows.
    """

    def __init__(self, pipes: dict[str, Pipeline]):
        self.pipes = pipes

    def pipe(self, name: object) -> Pipeline:
        """The checkpoint of a name.

        Raises:
            UserError: there is none of that name; names are no paths.
        """
        return self.pipes[one_of("checkpoint", name, list(self.pipes))]

    def generate(
        self, name: object, what: object, count: object, *settings: object
    ) -> Iterator[tuple[str, str, Drawn | None]]:
        """Pictures and curve of each step; the last one comes with all that was drawn."""
        pipe = self.pipe(name)
        ask = asked(pipe, what, count, settings)
        with closing(draw(pipe, ask, str(name))) as drawing:
            for one in drawing:
                if isinstance(one, Drawn):
                    last = one.evaluations
                    yield show.pictures(one, last, 0), show.curves(one, last), one
                else:
                    yield *show.under_way(one), None

    def classes(
        self, name: object, chosen: object, count: object, *settings: object
    ) -> Iterator[tuple[str, str]]:
        """Progress, and at last the classes or prompts from the hardest to the easiest.

        Args:
            name: of the checkpoint.
            chosen: classes, or prompts one a line.
            count: rounds with other noise; in each all of them share a batch.
            settings: see `Settings`.
        """
        pipe = self.pipe(name)
        things = several(pipe, chosen)
        count = whole("samples of each", count, 1, 4)
        wanted, names = map(list, zip(*things, strict=True))
        ask = ask_for(pipe, wanted, names, settings)
        results = []
        for turn in range(count):
            keys = range(turn * len(wanted), (turn + 1) * len(wanted))
            told = f"round {turn + 1} of {count}"
            for words, result in _run(pipe, ask, told, keys=list(keys)):
                if result is None:
                    yield words, ""
                else:
                    results.append(result)
        if results[0].spent is None:
            raise UserError("classes: a dense model spends the same on all of them")
        spent = np.stack([result.spent for result in results], axis=1)
        images = np.stack([result.images for result in results], axis=1)
        yield "", show.ranked(names, list(spent), list(images))

    def compare(
        self,
        kind: object,
        name: object,
        what: object,
        count: object,
        *settings: object,
    ) -> Iterator[tuple[str, str]]:
        """Progress, and at last two or more generations of the same noise.

        Args:
            kind: RULES, COMPANY or CHECKPOINTS.
            name: of the checkpoint.
            what: class or prompt.
            count: samples.
            settings: see `Settings`; then rule, capacity and threshold of the second, for RULES.
        """
        kind = one_of("comparison", kind, self.kinds())
        first, second = settings[:7], [*settings[:4], *settings[7:10]]
        pipe = self.pipe(name)
        if kind == RULES:
            runs = [
                (rule_words(ask), pipe, ask, None)
                for ask in (asked(pipe, what, count, chosen) for chosen in (first, second))
            ]
        elif kind == CHECKPOINTS:
            runs = [
                (other, one, asked(one, what, count, plain(one, first)), None)
                for other, one in self.pipes.items()
            ]
        else:
            yield from self._company(pipe, asked(pipe, what, count, first))
            return
        done = []
        for number, (title, one, ask, keys) in enumerate(runs, 1):
            for words, result in _run(one, ask, f"{number} of {len(runs)}: {title}", keys=keys):
                if result is None:
                    yield words, ""
                else:
                    done.append(result)
        titles = [f"{letter} · {run[0]}" for letter, run in zip("ABCDEFGH", runs, strict=False)]
        yield "", _difference(done) + show.side_by_side(done, titles)

    def kinds(self) -> list[str]:
        """Comparisons that can be made."""
        return [RULES, COMPANY, *([CHECKPOINTS] if len(self.pipes) > 1 else [])]

    def _company(self, pipe: Pipeline, ask: Ask) -> Iterator[tuple[str, str]]:
        """The samples of a batch, and the first ones again, each alone with its own noise."""
        together, alone = None, []
        for words, result in _run(pipe, ask, "together"):
            if result is None:
                yield words, ""
            else:
                together = result
        few = min(MOST_ALONE, len(ask.wanted))
        for number in range(few):
            here = slice(number, number + 1)
            one = replace(ask, wanted=ask.wanted[here], names=ask.names[here])
            for words, result in _run(pipe, one, f"alone: {number + 1} of {few}", keys=[number]):
                if result is None:
                    yield words, ""
                else:
                    alone.append(result)
        joined = _joined(alone)
        sees = pipe.routed(ask.routing).sees_batch()
        change = show.apart(joined.images, together.images[:few])
        sentence = company_words(sees, change, len(ask.wanted))
        titles = [f"in a batch of {len(ask.wanted)}", "each alone, with the same noise"]
        both = show.side_by_side([_first(together, few), joined], titles)
        yield "", views.words(sentence, "dm-lead") + both


def plain(pipe: Pipeline, settings: Settings) -> list[object]:
    """The settings as another checkpoint can have them: its own rule, and its own sampler."""
    seed, sampler, steps, guidance, *_ = settings
    known = samplers(pipe)
    return [
        seed,
        sampler if sampler in known else next(iter(known)),
        steps,
        guidance,
        OWN,
        None,
        None,
    ]


def several(pipe: Pipeline, chosen: object) -> list[tuple[Any, str]]:
    """Classes, or prompts one a line, all different.

    Raises:
        UserError: none or too many of them, or one that there is not.
    """
    if pipe.encoder is not None:
        if not isinstance(chosen, str) or len(chosen) > (LONGEST_PROMPT + 1) * MOST_THINGS:
            raise UserError(f"prompts: give up to {MOST_THINGS}, one a line")
        chosen = [line for line in chosen.splitlines() if line.strip()]
    if not isinstance(chosen, list) or not 2 <= len(chosen) <= MOST_THINGS:
        raise UserError(f"comparison: choose 2 to {MOST_THINGS} of them")
    things = list(dict.fromkeys(thing(pipe, one) for one in chosen))
    if len(things) < 2:
        raise UserError("comparison: choose at least 2 different ones")
    return things


def rule_words(ask: Ask) -> str:
    """The rule of routing for people."""
    if not ask.routing:
        return "routing as configured"
    value = ask.routing.get("inference_capacity", ask.routing.get("fixed_threshold"))
    return ask.routing["inference"] + ("" if value is None else f" at {value:g}")


def company_words(sees: bool, change: float, count: int) -> str:
    """What company does to a sample."""
    if sees:
        return (
            "The experts of this system choose among the tokens of the whole batch: the same noise "
            f"alone and among {count} differs by {change:.2f} of 255 in a pixel, on average."
        )
    return (
        "In this system no sample sees the others of its batch: the same noise alone and among "
        f"{count} differs by {change:.2f} of 255 in a pixel, by rounding alone."
    )


def class_choices(pipe: Pipeline) -> list[tuple[str, int]]:
    """Names and numbers of the classes, for a menu."""
    return [(class_title(pipe, label), label) for label in range(pipe.num_classes)]


def _run(
    pipe: Pipeline, ask: Ask, told: str, keys: list[int] | None = None
) -> Iterator[tuple[str, Drawn | None]]:
    """Words about a generation while it goes on, then what it made, without pictures of steps."""
    with closing(draw(pipe, ask, "", keys)) as drawing:
        for one in drawing:
            if isinstance(one, Progress):
                words = f"{told}, evaluation {one.done} of {one.total}"
                yield views.bar(one.done, one.total, words), None
            else:
                yield "", one


def _joined(alone: list[Drawn]) -> Drawn:
    """Samples that were drawn one by one, as one generation."""
    first = alone[0]
    maps = [
        None if one is None else np.concatenate([each.maps[i] for each in alone], axis=1)
        for i, one in enumerate(first.maps)
    ]
    spent = None if first.spent is None else np.concatenate([each.spent for each in alone])
    images = np.concatenate([each.images for each in alone])
    lines = np.mean([each.lines for each in alone], axis=0)
    names = [name for each in alone for name in each.names]
    return Drawn("", names, images[None], images, maps, lines, spent, first.top, first.cost)


def _first(drawn: Drawn, count: int) -> Drawn:
    """The first samples of a generation."""
    maps = [None if one is None else one[:, :count] for one in drawn.maps]
    spent = None if drawn.spent is None else drawn.spent[:count]
    images = drawn.images[:count]
    return Drawn(
        "",
        drawn.names[:count],
        images[None],
        images,
        maps,
        drawn.lines,
        spent,
        drawn.top,
        drawn.cost,
    )


def _difference(drawn: list[Drawn]) -> str:
    """How far the second generation is from the first."""
    if len(drawn) != 2 or drawn[0].images.shape != drawn[1].images.shape:
        return ""
    change = show.apart(drawn[0].images, drawn[1].images)
    sentence = f"The images differ by {change:.2f} of 255 in a pixel, on average."
    return views.words(sentence, "dm-lead")
