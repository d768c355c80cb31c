"""Whole sets of images, made in blocks of indices [j B, (j + 1) B).

Every process takes whole blocks, and the last one is computed full, then cut: a sample never
depends on how many processes there are, although DiffMoE's routing depends on the batch.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.distributed import Processes
from core.files import complete_file
from core.logging import progress
from core.npz import NpzWriter
from sampling.generate import Sampler
from sampling.grid import save_png
from sampling.marks import mark
from sampling.recorder import RoutingTable
from sampling.sets import SetFolder
from sampling.wanted import Wanted

GRID_IMAGES = 100


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
    with (
        progress(None, processes, "sampling", "img", total=total) as bar,
        ThreadPoolExecutor(1) as writer,  # files of a block are written while the next is drawn
    ):
        writing: Future | None = None
        for first in mine:
            block = _draw_block(sampler, decode, measure, plan, first, kept(first))
            if writing is not None:
                writing.result()
            writing = writer.submit(_write_block, plan, block)
            bar.update(kept(first))
        if writing is not None:
            writing.result()
    processes.barrier()
    if not processes.is_main:
        return None
    return _assemble(plan, blocks, sum(kept(first) for first in missing))


@dataclass(frozen=True)
class _Block:
    """What was drawn of a block: number of the first image, images (B, H, W, 3), further arrays."""

    first: int
    images: Tensor
    arrays: dict[str, np.ndarray]


def _draw_block(
    sampler: Sampler,
    decode: Decode,
    measure: Measure | None,
    plan: SetPlan,
    first: int,
    kept: int,
) -> _Block:
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
    seen = len(images) if plan.save == "npz" else max(0, min(GRID_IMAGES - first, kept))
    arrays["images"] = images[:seen].numpy()
    if sampler.record:
        arrays |= {f"routing {k}": v for k, v in cost.model.arrays(kept).items()}
    return _Block(first, images, arrays)


def _write_block(plan: SetPlan, block: _Block) -> None:
    """The images first: a block whose own file is there is finished."""
    if plan.save in ("images", "geneval"):
        for index, image in enumerate(block.images, block.first):
            path = plan.folder.image(index)
            if plan.save == "geneval":
                path = plan.folder.geneval_image(*plan.wanted.key(index))
            save_png(image, path, plan.hashes)
    with complete_file(plan.folder.part(block.first)) as temporary, temporary.open("wb") as file:
        np.savez(file, **block.arrays)


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
