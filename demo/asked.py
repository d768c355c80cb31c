"""What a visitor asks for, checked: a page can be filled in wrongly, and anybody can post to it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from config.objective import SAMPLERS, SamplingConfig
from core.errors import UserError
from sampling.pipeline import Pipeline

MOST_IMAGES = 16
MOST_STEPS = 200
MOST_GUIDANCE = 20.0
MOST_SEED = 2**31 - 1
LONGEST_PROMPT = 300
MOST_KEPT = 2**27
"""Numbers of the pictures of all steps of a generation, which stay in memory for the sliders."""

EVALUATIONS = {
    **{"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "euler_maruyama": 1},
    **{"ddpm": 1, "ddim": 1},
}
"""Samplers that the page offers, and how often they evaluate the model in a step."""

EACH = "each in turn"
"""In the place of a class: the first image of class 0, the second of class 1, and so on."""

OWN = "as configured"
"""The rule of routing that the checkpoint's config has."""


@dataclass(frozen=True)
class Ask:
    """A generation that can be started.

    Attributes:
        wanted: class or prompt of each sample.
        names: the same for people.
        seed: of the noise.
        routing: of `Pipeline.sample`.
        sampling: settings of the same.
        evaluations: of the model in all.
    """

    wanted: list[int] | list[str]
    names: list[str]
    seed: int
    routing: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 0

    def words(self) -> dict[str, Any]:
        """As the arguments of `Pipeline.sample` and `stream`."""
        about = {"wanted": self.wanted, "seed": self.seed, "routing": self.routing}
        return about | self.sampling


Settings = Sequence[object]
"""Seed, sampler, steps, guidance, rule, capacity and threshold, as the page has them."""


def asked(pipe: Pipeline, what: object, count: object, settings: Settings) -> Ask:
    """A generation of `count` samples of one class or prompt, or of EACH.

    Raises:
        UserError: naming what is not allowed, and what is.
    """
    count = whole("images", count, 1, MOST_IMAGES)
    if what == EACH and pipe.encoder is None:
        wanted = [number % pipe.num_classes for number in range(count)]
        return ask_for(pipe, wanted, [class_title(pipe, label) for label in wanted], settings)
    one, name = thing(pipe, what)
    return ask_for(pipe, [one] * count, [name] * count, settings)


def ask_for(pipe: Pipeline, wanted: list, names: list[str], settings: Settings) -> Ask:
    """The same of what is known to be a class or prompt for each sample."""
    seed, sampler, steps, guidance, rule, capacity, threshold = settings
    seed = whole("seed", seed, 0, MOST_SEED)
    steps = whole("steps", steps, 1, MOST_STEPS)
    known = samplers(pipe)
    sampling = {"sampler": one_of("sampler", sampler, list(known)), "num_steps": steps}
    sampling["cfg_scale"] = number("guidance", guidance, 0, MOST_GUIDANCE)
    evaluations = steps * known[sampler]
    _check_kept(pipe, len(wanted), evaluations)
    routing = routing_of(pipe, rule, capacity, threshold)
    pipe.routed(routing).settings(sampling)  # refuses what does not fit
    return Ask(wanted, names, seed, routing, sampling, evaluations)


def samplers(pipe: Pipeline) -> dict[str, int]:
    """Of EVALUATIONS, those of the checkpoint's objective."""
    known = SAMPLERS[pipe.pretrained.config.objective.name]
    return {name: count for name, count in EVALUATIONS.items() if name in known}


def defaults(pipe: Pipeline) -> SamplingConfig:
    """The checkpoint's own settings, as far as the page offers them."""
    return pipe.pretrained.config.sampling


def rules(pipe: Pipeline) -> list[str]:
    """What a visitor may choose of: nothing where there is one way alone."""
    found = pipe.routing_rules
    return [OWN, *found] if found else []


def routing_of(pipe: Pipeline, rule: object, capacity: object, threshold: object) -> dict[str, Any]:
    """The rule as `Pipeline.sample` takes it; values that the rule does not need do not count.

    Raises:
        UserError: the layers have no such rule, or do not allow the value.
    """
    if rule in (None, OWN):
        return {}
    if rule not in pipe.routing_rules:
        layer = pipe.pretrained.config.model.feed_forward.name
        allowed = ", ".join([OWN, *pipe.routing_rules])
        raise UserError(f"routing rule: the {layer} layer has no {rule!r}; allowed: {allowed}")
    routing: dict[str, Any] = {"inference": rule}
    if rule == "topk" and "inference_capacity" in pipe.routing_keys:
        experts = pipe.pretrained.config.model.feed_forward.num_experts
        routing["inference_capacity"] = number("capacity", capacity, 0.05, experts)
    if rule == "fixed":
        routing["fixed_threshold"] = number("threshold", threshold, 0, 1)
    return routing


def thing(pipe: Pipeline, what: object) -> tuple[int | str, str]:
    """A class or prompt, and its name for people.

    Raises:
        UserError: there is no such class, or the text is none that can be drawn.
    """
    if pipe.encoder is None:
        if isinstance(what, str) and what.strip().isdecimal():
            what = int(what)
        label = whole("class", what, 0, pipe.num_classes - 1)
        return label, class_title(pipe, label)
    if not isinstance(what, str) or not what.strip():
        raise UserError("prompt: it is empty; say what to draw")
    if len(what) > LONGEST_PROMPT:
        raise UserError(
            f"prompt: {len(what)} letters are too many; at most {LONGEST_PROMPT} are allowed"
        )
    text = " ".join(what.split())
    return text, text


def class_title(pipe: Pipeline, label: int) -> str:
    """Number and name of a class, or the number where that is its name."""
    name = pipe.class_names[label]
    return name if name == str(label) else f"{label} · {name}"


def _check_kept(pipe: Pipeline, count: int, evaluations: int) -> None:
    """The pictures of all steps must fit in memory."""
    size = 3 * pipe.pretrained.config.data.image_size**2
    if count * evaluations * size > MOST_KEPT:
        most = max(1, MOST_KEPT // (count * size))
        raise UserError(
            f"steps: {evaluations} evaluations of {count} images of this size are too many to "
            f"keep; at most {most} are allowed"
        )


def whole(name: str, value: object, least: int, most: int) -> int:
    """A whole number.

    Raises:
        UserError: it is none, or out of its range.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _refused(name, value, f"a whole number of {least} ... {most}")
    return value


def number(name: str, value: object, least: float, most: float) -> float:
    """A finite number.

    Raises:
        UserError: it is none, or out of its range.
    """
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not least <= value <= most:
        raise _refused(name, value, f"a number of {least:g} ... {most:g}")
    return float(value)


def one_of(name: str, value: object, known: Sequence[str]) -> str:
    """A name among others.

    Raises:
        UserError: it is not among them.
    """
    if not isinstance(value, str) or value not in known:
        raise _refused(name, value, f"one of {', '.join(known)}")
    return value


def _refused(name: str, value: object, allowed: str) -> UserError:
    shown = repr(value)
    shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
    return UserError(f"{name}: {shown} is not allowed; allowed: {allowed}")
