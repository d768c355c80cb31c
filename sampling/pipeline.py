"""A checkpoint ready to draw: images, and where their computation went, step by step if wanted.

    pipe = load("runs/quickstart/train")
    result = pipe.sample([3, 8], seed=0, cfg_scale=2.0)
    for step in pipe.stream([3, 8], seed=0): ...

Shapes: N samples, H and W of the image.
"""

import dataclasses
import typing
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config.model import ModelConfig
from config.objective import SamplingConfig
from config.typed import convert
from config.validate import validate
from core.conditions import Condition
from core.errors import UserError, unknown_name
from data.text.encoder import TextEncoder
from data.vae import VAE, PixelSpace, open_vae, to_uint8
from models.pretrained import (
    INFERENCE_KEYS,
    Pretrained,
    load_pretrained,
    rerouted,
    routing_rules,
)
from sampling.command import check_vae
from sampling.generate import Evaluation, Sampler
from sampling.prompts import check_prompt, text_encoder_of
from sampling.recorder import Routing
from sampling.sets import run_name
from sampling.stream import streamed


@dataclass(frozen=True)
class Step:
    """One evaluation of the model on the way to the images.

    Attributes:
        images: (N, H, W, 3) uint8, the data that the model sees behind the noise there.
        routing: of this evaluation alone (T = 1); None for a model without experts.
        number: of the evaluation, from 0. `heun` and `midpoint` have two in a step of theirs.
        time: as the objective counts it.
    """

    images: np.ndarray
    routing: Routing | None
    number: int
    time: float


@dataclass(frozen=True)
class Result:
    """Finished images.

    Attributes:
        images: (N, H, W, 3) uint8.
        routing: of all evaluations; None for a model without experts.
        wanted: class or prompt of each.
        seed: of the noise.
        sampling: sampler, steps, guidance that they were made with.
        nfe: evaluations of the model for each sample, guidance counting twice.
    """

    images: np.ndarray
    routing: Routing | None
    wanted: list[int] | list[str]
    seed: int
    sampling: SamplingConfig
    nfe: int


@dataclass(frozen=True)
class Pipeline:
    """A model with what turns classes or prompts into its conditions and its latents into images.

    Attributes:
        pretrained: config, state and model.
        vae: the decoder, or the identity for models of pixels.
        encoder: of prompts; None for a model of classes.
        device: where all of them are.
    """

    pretrained: Pretrained
    vae: VAE | PixelSpace
    encoder: TextEncoder | None
    device: torch.device

    @property
    def name(self) -> str:
        """Of the run and its step."""
        return f"{run_name(self.pretrained.path)}, step {self.pretrained.state['step']}"

    @property
    def num_classes(self) -> int:
        """Classes that it draws; 0 for a model of prompts, 1 for one without classes."""
        return 0 if self.encoder is not None else max(self.pretrained.config.model.num_classes, 1)

    @property
    def class_names(self) -> list[str]:
        """Of its classes; their numbers where the checkpoint does not name them."""
        names = (self.pretrained.state["latents"] or {}).get("class_names") or []
        numbers = [str(i) for i in range(self.num_classes)]
        return list(names) if len(names) == len(numbers) else numbers

    @property
    def routing_rules(self) -> tuple[str, ...]:
        """Values of `inference` that its layers allow."""
        return routing_rules(self.pretrained.config)

    @property
    def routing_keys(self) -> tuple[str, ...]:
        """Keys of `routing` that its layers have."""
        layer = self.pretrained.config.model.feed_forward
        return tuple(key for key in INFERENCE_KEYS if hasattr(layer, key))

    def routed(self, routing: dict[str, Any] | None) -> "Pipeline":
        """The same weights under another rule, see `models.pretrained.rerouted`.

        Raises:
            UserError: the layers have no such rule.
        """
        if not routing:
            return self
        return dataclasses.replace(self, pretrained=rerouted(self.pretrained, routing))

    def sees_batch(self) -> bool:
        """Whether what a sample gets depends on the others that are drawn with it."""
        return self.pretrained.config.model.feed_forward.sampling_sees_batch()

    def cost(self) -> float:
        """Of an expert, see `expert_cost`."""
        return expert_cost(self.pretrained.config.model)

    def sample(
        self,
        wanted: Sequence[int] | Sequence[str],
        seed: int = 0,
        keys: Sequence[int] | None = None,
        routing: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Result:
        """Images of classes or prompts.

        Args:
            wanted: class or prompt of each sample.
            seed: of the noise.
            keys: number of each sample's noise under that seed; by default 0, 1, ... A sample keeps
                its noise in any company.
            routing: another rule: `inference`, `inference_capacity`, `fixed_threshold`.
            sampling: keys of `SamplingConfig` that differ from the checkpoint's.

        Raises:
            UserError: classes or prompts that it does not know, or settings that do not fit it.
        """
        return self._work(wanted, seed, keys, routing, sampling)(None)

    def stream(
        self,
        wanted: Sequence[int] | Sequence[str],
        seed: int = 0,
        keys: Sequence[int] | None = None,
        routing: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> Generator[Step | Result, None, None]:
        """The same, step by step: a `Step` for each evaluation, and at last the `Result`.

        Work is done in a thread, a few steps ahead at most. Closing the iterator, or forgetting it,
        ends the work at the next evaluation; what goes wrong there is raised here.

        Args, Raises: as of `sample`; the arguments are checked at once.
        """
        return streamed(self._work(wanted, seed, keys, routing, sampling))

    def _work(
        self,
        wanted: Sequence[int] | Sequence[str],
        seed: int,
        keys: Sequence[int] | None,
        routing: dict[str, Any] | None,
        sampling: dict[str, Any],
    ) -> Callable[[Callable[[Step], None] | None], Result]:
        """What makes the result, and tells of its steps; everything is checked here."""
        pipe = self.routed(routing)
        wanted, keys = list(wanted), list(range(len(wanted)) if keys is None else keys)
        pipe._check(wanted, seed, keys)
        settings = pipe.settings(sampling)

        def work(tell: Callable[[Step], None] | None) -> Result:
            sampler = Sampler.of(pipe.pretrained, settings, seed, pipe.device)
            sampler.record = "detailed"

            def watch(evaluation: Evaluation) -> None:
                images = pipe._images(evaluation.data)
                tell(Step(images, evaluation.routing, evaluation.number, evaluation.time))

            cond = pipe._condition(wanted)
            latents, meter = sampler.latents(keys, cond, None if tell is None else watch)
            images, routing = pipe._images(latents), meter.model.detail()
            return Result(images, routing, wanted, seed, settings, meter.calls)

        return work

    def settings(self, changes: dict[str, Any]) -> SamplingConfig:
        """The checkpoint's settings of sampling with changes, checked.

        Raises:
            UserError: naming the key.
        """
        config, known = self.pretrained.config, typing.get_type_hints(SamplingConfig)
        for key, value in changes.items():
            if key not in known:
                raise unknown_name("sampling", key, known)
            if isinstance(value, float) and not np.isfinite(value):
                raise UserError(f"sampling.{key}: {value} is not a finite number")
        typed = {k: convert(v, known[k], f"sampling.{k}") for k, v in changes.items()}
        settings = dataclasses.replace(config.sampling, **typed)
        validate(dataclasses.replace(config, sampling=settings), world_size=None)
        return settings

    def _check(self, wanted: list, seed: int, keys: list) -> None:
        if not wanted:
            raise UserError("wanted: nothing; name a class or a prompt for each image")
        for field, values in (("seed", [seed]), ("keys", keys)):
            for value in values:
                if not _is_whole(value) or not 0 <= value < 2**63:
                    raise UserError(f"{field}: {value!r} is no whole number of 0 ... 2^63 - 1")
        if len(keys) != len(wanted):
            raise UserError(f"keys: {len(keys)} for {len(wanted)} images; one each is wanted")
        for number, one in enumerate(wanted, 1):
            if self.encoder is not None:
                if not isinstance(one, str):
                    raise UserError(f"prompt {number}: {one!r} is no text; the model takes prompts")
                check_prompt(one, f"prompt {number}")
            elif not _is_whole(one) or not 0 <= one < self.num_classes:
                raise UserError(
                    f"class: {one!r} is not allowed; allowed: 0 ... {self.num_classes - 1}"
                )

    def _condition(self, wanted: list) -> Condition:
        if self.encoder is None:
            return Condition.of_labels(wanted)
        different = list(dict.fromkeys(wanted))
        rows = dict(zip(different, self.encoder.encode(different), strict=True))
        return Condition.of_rows([rows[text] for text in wanted], self.encoder.max_length)

    def _images(self, latents: Tensor) -> np.ndarray:
        return to_uint8(self.vae.decode(latents)).numpy()


def load(
    path: str | Path,
    weights: str = "ema",
    device: str | torch.device | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Pipeline:
    """A checkpoint with everything that it needs to draw.

    Args:
        path: what `models.pretrained.load_pretrained` takes: a run, a checkpoint folder.
        weights: the averaged `ema`, another average `ema_<decay>`, or the live `model`.
        device: by default a GPU where there is one.
        vae: its decoder, a hub id or a folder; by default the one that it was trained with.
        text_encoder: the same of the text encoder.

    Raises:
        UserError: something is missing, damaged, or does not belong together.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pretrained = load_pretrained(path, weights)
    decoder = open_vae(vae or pretrained.config.data.vae_path, device)
    check_vae(decoder, pretrained)
    encoder = None
    if pretrained.config.model.text_hidden_size is not None:
        encoder = text_encoder_of(pretrained, text_encoder, device)
    pretrained.model.to(device)
    return Pipeline(pretrained, decoder, encoder, device)


def expert_cost(model: ModelConfig) -> float:
    """What an expert costs for a token, in units of a dense layer of its kind: by their widths."""
    return model.expert_width() / model.dense_width() if model.moe_blocks() else 1.0


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
