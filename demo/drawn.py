"""What was generated or recorded, as the page shows it.

Shapes: T evaluations, L layers, N samples, H and W of the image, S tokens, E experts.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from core.errors import UserError
from demo.asked import Ask, whole
from evaluations.plots import capacity_lines
from sampling.pipeline import Pipeline, Result
from sampling.recorder import Routing

TOP = 2.5
"""The colour scale ends at so many times the capacity that is asked for."""


@dataclass
class Drawn:
    """Pictures of every step, with what the experts did.

    Attributes:
        title: of the checkpoint or set.
        names: of the samples.
        steps: (T, N, H, W, 3) uint8; (1, N, H, W, 3) where only the end is known.
        images: (N, H, W, 3) uint8, finished.
        maps: by layer, 0 being the mean over the layers: (T, N, S) experts of each token, or None
            for a layer without.
        lines: (T, L) experts per token over the samples.
        spent: (N,) C_infer of each sample; None for a model without experts.
        top: where the colours end.
        cost: of an expert, in units of a dense layer.
        routing: which experts it were, where that is known.
        rate: evaluations in a second.
    """

    title: str
    names: list[str]
    steps: np.ndarray
    images: np.ndarray
    maps: list[np.ndarray | None]
    lines: np.ndarray
    spent: np.ndarray | None
    top: float
    cost: float = 1.0
    routing: Routing | None = None
    rate: float | None = None

    @property
    def evaluations(self) -> int:
        """T."""
        return max(len(self.steps), len(self.lines))

    @property
    def layers(self) -> int:
        """L."""
        return max(len(self.maps) - 1, 0)

    def map_at(self, step: object, layer: object) -> np.ndarray | None:
        """(N, S) experts of each token.

        Args:
            step: number of the evaluation, from 1.
            layer: from 1; 0 for the mean over the layers.

        Raises:
            UserError: there is no such step or layer.
        """
        step = whole("step", step, 1, self.evaluations)
        layer = whole("layer", layer, 0, self.layers)
        maps = self.maps[layer] if self.maps else None
        return None if maps is None else maps[step - 1]

    def image_at(self, step: object) -> np.ndarray:
        """(N, H, W, 3) as they were, or the finished ones where nothing else is known."""
        step = whole("step", step, 1, self.evaluations)
        return self.steps[min(step, len(self.steps)) - 1]


@dataclass
class Progress:
    """A generation that is under way, added to by each step.

    Attributes:
        total: evaluations that are to come in all.
        top: where the colours end.
        cost: of `Drawn`.
        names: of the samples.
        images: (N, H, W, 3) of the last step.
        maps: (N, S) mean over the layers there, or None.
        lines: (L,) of each step so far.
        done: steps so far.
    """

    total: int
    top: float
    cost: float
    names: list[str]
    images: np.ndarray | None = None
    maps: np.ndarray | None = None
    lines: list[np.ndarray] = field(default_factory=list)
    done: int = 0


def draw(
    pipe: Pipeline, ask: Ask, title: str, keys: list[int] | None = None
) -> Iterator[Progress | Drawn]:
    """The generation step by step, and at last all of it; closing it ends the work."""
    top = scale_of(pipe, ask)
    progress = Progress(ask.evaluations, top, pipe.cost(), ask.names)
    steps, began = [], time.perf_counter()
    with closing(pipe.stream(**ask.words(), keys=keys)) as stream:
        for step in stream:
            if isinstance(step, Result):
                rate = len(steps) / (time.perf_counter() - began)
                yield finished(pipe, step, ask, title, np.stack(steps), top, rate)
                return
            steps.append(step.images)
            progress.done, progress.images = step.number + 1, step.images
            if step.routing is not None:
                numbers = step.routing.numbers()
                progress.maps = None if numbers is None else numbers[0]
                progress.lines.append(capacity_lines(step.routing.capacity)[0])
            yield progress


def finished(
    pipe: Pipeline,
    result: Result,
    ask: Ask,
    title: str,
    steps: np.ndarray,
    top: float,
    rate: float | None = None,
) -> Drawn:
    """All that is shown of a result."""
    routing = result.routing
    if routing is None:
        lines = np.empty((len(steps), 0))
        return Drawn(title, ask.names, steps, result.images, [], lines, None, top, rate=rate)
    maps = [routing.numbers(), *(routing.numbers(i) for i in range(len(routing.chosen)))]
    lines, spent = capacity_lines(routing.capacity), routing.spent()
    about = pipe.cost(), routing, rate
    return Drawn(title, ask.names, steps, result.images, maps, lines, spent, top, *about)


def scale_of(pipe: Pipeline, ask: Ask) -> float:
    """Experts per token at the end of the colour scale, the same for all steps and layers."""
    layer = pipe.pretrained.config.model.feed_forward
    experts = getattr(layer, "num_experts", 1)
    wanted = ask.routing.get("inference_capacity") or getattr(layer, "inference_capacity", None)
    if wanted is None:
        wanted = layer.experts_per_token() if experts > 1 else 1.0
    return float(min(experts, TOP * max(1.0, wanted)))


def tokens_of(drawn: Drawn, layer: object, expert: object, step: int) -> np.ndarray:
    """(N, S) bool, which tokens an expert computed.

    Args:
        drawn: of a generation.
        layer: from 1.
        expert: from 1.
        step: from 1.

    Raises:
        UserError: there is no such layer or expert, or nobody knows.
    """
    if drawn.routing is None:
        raise UserError("expert: which experts computed a token is not known here")
    layer = whole("layer", layer, 1, drawn.layers)
    expert = whole("expert", expert, 1, drawn.routing.num_experts)
    taken = drawn.routing.experts(layer - 1)
    if taken is None:
        raise UserError(f"layer: {layer} keeps no plan of its tokens")
    return taken[step - 1, :, :, expert - 1]
