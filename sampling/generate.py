"""Seeded samples: a batch of latents, and whole sets of images in blocks of indices.

The unit of work is the block of indices [j B, (j + 1) B). Every process takes whole blocks, and
the last one is computed full, then cut: a sample never depends on how many processes there are,
although DiffMoE's routing depends on the batch.
"""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from config.objective import SamplingConfig
from core.conditions import Condition
from core.distributed import Processes
from core.files import complete_file
from core.logging import progress
from core.npz import NpzWriter
from core.rng import SampleNoise, generator
from core.types import Model, Objective
from models.compiled import compile_blocks
from models.dit import DiT
from models.pretrained import Pretrained
from sampling.grid import save_png
from sampling.guidance import CapacityMeter, Guided, InBfloat16, Watch, Watched
from sampling.marks import mark
from sampling.objectives import build_objective
from sampling.recorder import Routing, RoutingRecorder, RoutingTable
from sampling.sets import SetFolder
from sampling.wanted import Wanted

GRID_IMAGES = 100


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


SAVE = ("npz", "images", "geneval", "none")
"""Forms in which the images stay: one file, a folder of PNGs, folders as GenEval's evaluator reads
them, or not at all."""

Decode = Callable[[Tensor], Tensor]
"""Latents (B, C, h, w) -> images (B, H, W, 3) uint8 on the CPU."""

Measure = Callable[[Tensor], dict[str, Tensor]]
"""Images (B, H, W, 3) uint8 -> features (B, D) by name."""


@dataclass(frozen=True)
class SetPlan:
    """A set of images.

    Attributes:
        wanted: the class or prompt of each sample.
        num_samples: N.
        block_size: B, samples per forward pass of a process.
        folder: where it lies, with the settings of its blocks.
        save: one of SAVE.
        hashes: of checkpoint and set, by the names that files carry them under.
    """

    wanted: Wanted
    num_samples: int
    block_size: int
    folder: SetFolder
    save: str
    hashes: dict[str, str]


@dataclass
class SampleSet:
    """Generated images.

    Attributes:
        first: (min(N, 100), H, W, 3) uint8, the first of them.
        labels: (N,) int64, of classes or prompts.
        capacity: mean C_infer; None without MoE layers.
        nfe: evaluations of the model for each sample, guidance counting twice; the mean where an
            adaptive solver takes more for some blocks.
        features: (N, D) by name, where they were measured.
        made: samples that this run generated; the others were there.
        routing: where the computation went, if that was recorded.
    """

    first: Tensor
    labels: np.ndarray
    capacity: float | None
    nfe: float
    features: dict[str, np.ndarray]
    made: int
    routing: RoutingTable | None


def generate_set(
    sampler: Sampler,
    decode: Decode,
    measure: Measure | None,
    plan: SetPlan,
    processes: Processes,
) -> SampleSet | None:
    """Generate what `plan` says, a file for each finished block; the main process gets the result.

    A run that was killed is taken up again: only blocks without a file are made. The blocks stay,
    for the caller to remove when everything that is made of them is written.

    Args:
        sampler: makes the latents.
        decode: makes images of them.
        measure: makes features of the images, where they are wanted.
        plan: of the set.
        processes: all of which call this function.
    """
    blocks = range(0, plan.num_samples, plan.block_size)
    missing = None
    if processes.is_main:
        missing = [first for first in blocks if not plan.folder.part(first).exists()]
    missing = processes.from_main(missing)

    def kept(first: int) -> int:
        return min(plan.block_size, plan.num_samples - first)

    mine = missing[processes.rank :: processes.world_size]
    total = sum(kept(first) for first in mine)
    with progress(None, processes, "sampling", "img", total=total) as bar:
        for first in mine:
            _write_block(sampler, decode, measure, plan, first, kept(first))
            bar.update(kept(first))
    processes.barrier()
    if not processes.is_main:
        return None
    return _assemble(plan, blocks, sum(kept(first) for first in missing))


def _write_block(
    sampler: Sampler,
    decode: Decode,
    measure: Measure | None,
    plan: SetPlan,
    first: int,
    kept: int,
) -> None:
    indices = range(first, first + plan.block_size)
    wanted = plan.wanted
    labels = [wanted.group(i) for i in indices]
    latents, cost = sampler.latents([wanted.key(i) for i in indices], wanted.condition(indices))
    images = decode(latents)[:kept]
    capacity = cost.capacity()
    arrays = {
        "labels": np.array(labels[:kept]),
        "capacity": np.empty(0) if capacity is None else capacity[:kept].double().cpu().numpy(),
        "nfe": np.full(kept, cost.calls),
    }
    if measure is not None:
        features = measure(images)
        arrays |= {f"feature {name}": x.float().cpu().numpy() for name, x in features.items()}
    if plan.save in ("images", "geneval"):
        for index, image in zip(indices, images, strict=False):
            path = plan.folder.image(index)
            if plan.save == "geneval":
                path = plan.folder.geneval_image(*wanted.key(index))
            save_png(image, path, plan.hashes)
    seen = len(images) if plan.save == "npz" else max(0, min(GRID_IMAGES - first, kept))
    arrays["images"] = images[:seen].numpy()
    if sampler.record:
        arrays |= {f"routing {k}": v for k, v in cost.model.arrays(kept).items()}
    with complete_file(plan.folder.part(first)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _assemble(plan: SetPlan, blocks: range, made: int) -> SampleSet:
    """Join the blocks, one at a time: 50,000 images need no memory."""
    joined: dict[str, list[np.ndarray]] = {}
    first: list[np.ndarray] = []
    routing = None
    with ExitStack() as stack:
        archive = None
        if plan.save == "npz":
            out = stack.enter_context(complete_file(plan.folder.archive))
            archive = stack.enter_context(NpzWriter(out))
        for block in blocks:
            with np.load(plan.folder.part(block)) as part:
                arrays = dict(part)
            images = arrays.pop("images")
            first.extend(images[: max(0, GRID_IMAGES - len(first))])
            block_routing = _pop(arrays, "routing ")
            if block_routing:
                routing = routing or RoutingTable.start(block_routing, plan.wanted.num_groups)
                routing.add(block_routing, arrays["labels"])
            for name, values in arrays.items():
                joined.setdefault(name, []).append(values)
            if archive is not None:
                if block == 0:
                    archive.begin("arr_0", images.dtype, (plan.num_samples, *images.shape[1:]))
                archive.append(images)
        whole = {name: np.concatenate(values) for name, values in joined.items()}
        if archive is not None:
            archive.begin("labels", whole["labels"].dtype, whole["labels"].shape)
            archive.append(whole["labels"])
            mark(archive, plan.hashes)
    capacity = float(whole["capacity"].mean()) if len(whole["capacity"]) else None
    features = _pop(whole, "feature ")
    shown = torch.from_numpy(np.stack(first))
    nfe = float(whole["nfe"].mean())
    return SampleSet(shown, whole["labels"], capacity, nfe, features, made, routing)


def _pop(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Take out the arrays whose names start with `prefix`, and name them without it."""
    names = [name for name in arrays if name.startswith(prefix)]
    return {name.removeprefix(prefix): arrays.pop(name) for name in names}
