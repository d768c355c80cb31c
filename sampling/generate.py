"""Seeded samples: a batch of latents, whose noise depends on the seed and each sample's key."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from config.objective import SamplingConfig
from core.conditions import Condition
from core.rng import SampleNoise, generator
from core.types import Model, Objective
from models.compiled import compile_blocks
from models.dit import DiT
from models.pretrained import Pretrained
from sampling.guidance import CapacityMeter, Guided, InBfloat16, Watch, Watched
from sampling.objectives import build_objective
from sampling.recorder import Routing, RoutingRecorder


@dataclass(frozen=True)
class Evaluation:
    """One guided evaluation of the model while it samples.

    Solvers of first order evaluate once in a step, `heun` and `midpoint` twice, `rk4` four times.

    Attributes:
        number: of the evaluation, from 0.
        time: as the objective counts it.
        data: (B, C, H, W) that the guided prediction stands for: x0 as the model sees it there.
        routing: where the computation went, of this evaluation alone; None where nothing is
            recorded in detail or the model has no experts.
    """

    number: int
    time: float
    data: Tensor
    routing: Routing | None


@dataclass
class Sampler:
    """Everything that makes samples.

    Attributes:
        model: in evaluation mode, on `device`.
        objective: decides how noise becomes data.
        settings: sampler, steps, guidance.
        latent_shape: (C, H, W).
        seed: of the noise.
        device: where the model is.
        record: keep where the computation goes: in sums and means, or `detailed`, which experts
            each token of each sample had.
        negative: text of a negative prompt, one row, in the place of the empty caption.
        bf16: matrix products of the model in bf16.
    """

    model: DiT
    objective: Objective
    settings: SamplingConfig
    latent_shape: tuple[int, int, int]
    seed: int
    device: torch.device
    record: bool | Literal["detailed"] = False
    negative: Condition | None = None
    bf16: bool = False

    @classmethod
    def of(
        cls,
        pretrained: Pretrained,
        settings: SamplingConfig | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ) -> "Sampler":
        """The sampler of a loaded checkpoint, by default with its config's settings."""
        config, model = pretrained.config, pretrained.config.model
        return cls(
            pretrained.model.to(device),
            build_objective(config.objective),
            settings or config.sampling,
            (model.in_channels, model.input_size, model.input_size),
            seed,
            torch.device(device),
        )

    @torch.no_grad()
    def latents(
        self,
        keys: Sequence[int | tuple[int, ...]],
        cond: Condition,
        watch: Callable[[Evaluation], None] | None = None,
    ) -> tuple[Tensor, CapacityMeter]:
        """Latents (B, C, H, W) of B samples, and what their making cost.

        Args:
            keys: what the noise of each is drawn by, besides the seed: an index, or several.
            cond: of the samples.
            watch: told of each guided evaluation; the latents are the same with and without it.
                What it raises ends the sampling.
        """
        keys = [(key,) if isinstance(key, int) else key for key in keys]
        generators = [generator(self.seed, "sample noise", *key) for key in keys]
        draw = SampleNoise(generators, self.latent_shape, self.device)
        model = InBfloat16(self.model, self.device) if self.bf16 else self.model
        if self.record:
            model = RoutingRecorder(model, len(keys), self.record == "detailed")
        meter = CapacityMeter(model, len(keys))
        guided = Guided(meter, self._free, self.settings, one_call=self.shares_a_call())
        if watch is not None:
            guided = Watched(guided, self._teller(watch, model))
        cond = cond.to(self.device)
        latents = self.objective.sample(guided, draw(), cond, self.settings, draw)
        return latents, meter

    def _teller(self, watch: Callable[[Evaluation], None], model: Model) -> Watch:
        """What makes an `Evaluation` of each call, which `model` has recorded by then."""
        numbers = itertools.count()

        def tell(x: Tensor, t: Tensor, prediction: Tensor) -> None:
            data = self.objective.data_of(x, t, prediction)
            routing = model.detail(last=True) if self.record == "detailed" else None
            watch(Evaluation(next(numbers), float(t[0]), data, routing))

        return tell

    def shares_a_call(self) -> bool:
        """Whether both halves of guidance may go through the model at once."""
        return not self.model.config.feed_forward.sampling_sees_batch()

    def compile(self, **options: object) -> None:
        """Compile the model's blocks, with `options` of `torch.compile`."""
        layer = self.model.config.feed_forward
        varying = getattr(layer, "inference", "topk") != "topk"
        compile_blocks(self.model, varying, **options)

    def _free(self, cond: Condition) -> Condition:
        """The side that guidance leads away from."""
        null = self.model.null_condition(cond)
        if self.negative is None:
            return null
        rows = torch.zeros(len(cond), dtype=torch.int64, device=self.device)
        text = self.negative.to(self.device).rows(rows)  # one row travels, at every step
        return replace(null, text=text.text, mask=text.mask)
