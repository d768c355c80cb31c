"""Flags that would do nothing with what else was chosen, and are refused.

What was typed counts: the values of a protocol or a checkpoint may be of no use.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from config.objective import ADAPTIVE, CORRECTED, SDE_METHODS, SamplingConfig
from config.schema import Config
from core.command_line import Parser, hyphenated
from core.errors import ConfigError


class NotingParser(Parser):
    """A parser whose result has `typed`, the names of the flags that the user wrote."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As of `Parser`."""
        flags, unknown = super().parse_known_args(args, namespace)
        flags.typed = self.typed_in(sys.argv[1:] if args is None else args)
        return flags, unknown

    def typed_in(self, args: Iterable[str]) -> frozenset[str]:
        """Names of the flags among words, whatever their values."""
        written = {hyphenated(str(word)).partition("=")[0] for word in args}
        return frozenset(a.dest for a in self._actions if written.intersection(a.option_strings))

    def hide(self, *names: str) -> None:
        """Leave flags out of the help."""
        for action in self._actions:
            if action.dest in names:
                action.help = argparse.SUPPRESS

    def require(self, *names: str) -> None:
        """Make flags required, and let the usage name the required ones alone."""
        for action in self._actions:
            action.required |= action.dest in names
        needed = [a for a in self._actions if a.required and a.option_strings]
        words = [f"{a.option_strings[0]} {_value_of(a)}" for a in needed]
        self.usage = " ".join(["%(prog)s", *words, "[FLAGS]"])


def _value_of(action: argparse.Action) -> str:
    value = action.metavar or action.dest.upper()
    return f"{value} ..." if action.nargs == "+" else value


@dataclass(frozen=True)
class Choice:
    """What flags, protocol and checkpoint came to.

    Attributes:
        flags: of the command line, `typed` among them: names of those that the user wrote.
        config: of the checkpoint, routing as the flags have it.
        sampling: sampler, steps, guidance.
    """

    flags: argparse.Namespace
    config: Config
    sampling: SamplingConfig

    def routes_by(self, rule: str) -> bool:
        """Whether this inference rule decides what experts compute."""
        return getattr(self.config.model.feed_forward, "inference", None) == rule

    def takes_text(self) -> bool:
        """Whether prompts say what is drawn."""
        return self.config.model.text_hidden_size is not None


@dataclass(frozen=True)
class Need:
    """Flags, and what they need to do anything."""

    flags: tuple[str, ...]
    what: str
    met: Callable[[Choice], bool]


NEEDS = (
    Need(("inference_capacity",), "--inference topk", lambda c: c.routes_by("topk")),
    Need(("fixed_threshold",), "--inference fixed", lambda c: c.routes_by("fixed")),
    Need(("num_per_class",), "--classes", lambda c: c.flags.classes is not None),
    Need(
        ("num_fid_samples",),
        "no --classes or prompts, which say how many with --num-per-class or --num-per-prompt",
        lambda c: c.flags.classes is None and not c.takes_text(),
    ),
    Need(
        ("labels",),
        "a model with classes, and no --classes",
        lambda c: c.flags.classes is None and c.config.model.num_classes > 0 and not c.takes_text(),
    ),
    Need(("classes",), "a model of classes, not of text", lambda c: not c.takes_text()),
    Need(
        ("prompt", "prompts", "num_per_prompt", "negative_prompt", "text_encoder"),
        "a checkpoint trained on captions",
        Choice.takes_text,
    ),
    Need(
        ("num_sampling_steps",),
        "a sampler of fixed steps",
        lambda c: c.sampling.sampler not in ADAPTIVE,
    ),
    Need(
        ("time_shift",),
        "a flow and a sampler with fixed steps",
        lambda c: c.config.objective.name == "flow" and c.sampling.sampler not in ADAPTIVE,
    ),
    Need(
        ("cfg_interval", "cfg_channels", "cfg_pooling", "negative_prompt"),
        "guidance, a --cfg-scale other than 1",
        lambda c: c.sampling.cfg_scale != 1,
    ),
    Need(
        ("atol", "rtol"),
        f"a sampler with tolerances: {', '.join((*ADAPTIVE, *CORRECTED))}",
        lambda c: c.sampling.sampler in (*ADAPTIVE, *CORRECTED),
    ),
    Need(
        ("overshoot",),
        f"an adaptive sampler: {', '.join(ADAPTIVE)}",
        lambda c: c.sampling.sampler in ADAPTIVE,
    ),
    Need(("ddim_eta",), "--sampler ddim", lambda c: c.sampling.sampler == "ddim"),
    Need(
        ("clip_denoised",),
        "a checkpoint of objective ddpm",
        lambda c: c.config.objective.name == "ddpm",
    ),
    Need(
        ("diffusion_form", "diffusion_norm", "last_step", "last_step_size"),
        f"a stochastic sampler: {', '.join(SDE_METHODS)}",
        lambda c: c.sampling.sampler in SDE_METHODS,
    ),
    Need(
        ("last_step_size",),
        "a --last-step other than none",
        lambda c: c.sampling.last_step != "none",
    ),
)
"""Of the flags of sampling."""


def check_needs(choice: Choice) -> None:
    """Refuse what was typed and does nothing.

    Raises:
        ConfigError: naming the flag and what it needs.
    """
    for need in NEEDS:
        if not need.met(choice):
            refuse_typed(choice.flags, need.flags, f"does nothing here; it needs {need.what}")


def refuse_typed(flags: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuse flags that were typed.

    Args:
        flags: with `typed`.
        names: of flags, as attributes.
        why: what is wrong with them.

    Raises:
        ConfigError: naming the first of them.
    """
    for name in names:
        if name in flags.typed:
            raise ConfigError(f"--{name.replace('_', '-')}: {why}")
