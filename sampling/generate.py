"""Seeded samples: a batch of latents, and whole sets of images in blocks of indices.

The unit of work is the block of indices [j B, (j + 1) B). Every process takes whole blocks, and
the last one is computed full, then cut: a sample never depends on how many processes there are,
although DiffMoE's routing depends on the batch.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config.schema import SamplingConfig
from core.distributed import Processes
from core.files import complete_file
from core.logging import progress
from core.npz import NpzWriter
from core.rng import SampleNoise, generator
from core.types import Objective
from models.dit import DiT
from sampling.guidance import CapacityMeter, Guided
from sampling.labels import Labels

GRID_IMAGES = 100


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
    """

    model: DiT
    objective: Objective
    settings: SamplingConfig
    latent_shape: tuple[int, int, int]
    seed: int
    device: torch.device

    @torch.no_grad()
    def latents(self, indices: range, labels: list[int]) -> tuple[Tensor, CapacityMeter]:
        """Latents (B, C, H, W) of the samples `indices`, and what their making cost."""
        generators = [generator(self.seed, "sample noise", i) for i in indices]
        draw = SampleNoise(generators, self.latent_shape, self.device)
        cond = torch.tensor(labels, device=self.device)
        meter = CapacityMeter(self.model, len(indices))
        guided = Guided(meter, self.model.null_condition, self.settings)
        latents = self.objective.sample(guided, draw(), cond, self.settings, draw)
        return latents, meter


@dataclass
class SampleSet:
    """Generated images, (N, H, W, 3) uint8 on disk.

    Attributes:
        path: of the `.npz`.
        first: (min(N, 100), H, W, 3) uint8, the first of them.
        labels: (N,) int64.
        capacity: mean C_infer; None without MoE layers.
        nfe: evaluations of the model for each sample, guidance counting twice; the mean where an
            adaptive solver takes more for some blocks.
    """

    path: Path
    first: Tensor
    labels: np.ndarray
    capacity: float | None
    nfe: float


def generate_set(
    sampler: Sampler,
    labels: Labels,
    decode: Callable[[Tensor], Tensor],
    num_samples: int,
    block_size: int,
    path: Path,
    processes: Processes,
) -> SampleSet | None:
    """Write `num_samples` images to the `.npz` at `path`; the main process gets the result.

    Args:
        sampler: makes the latents.
        labels: the class of each sample.
        decode: latents (B, C, h, w) -> images (B, H, W, 3) uint8.
        num_samples: N.
        block_size: B, samples per forward pass of a process.
        path: of a file with `arr_0` (N, H, W, 3) uint8 and `labels` (N,) int64.
        processes: all of which call this function.
    """
    parts = path.parent / f".{path.stem}.parts"
    if processes.is_main:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
    processes.barrier()
    blocks = range(0, num_samples, block_size)
    mine = blocks[processes.rank :: processes.world_size]
    kept_of = {first: min(block_size, num_samples - first) for first in mine}
    with progress(None, processes, "sampling", "img", total=sum(kept_of.values())) as bar:
        for first, kept in kept_of.items():
            _write_block(sampler, labels, decode, range(first, first + block_size), kept, parts)
            bar.update(kept)
    processes.barrier()
    if not processes.is_main:
        return None
    result = _assemble([parts / f"{first:09d}.npz" for first in blocks], num_samples, path)
    shutil.rmtree(parts)
    return result


def _write_block(
    sampler: Sampler,
    label: Labels,
    decode: Callable[[Tensor], Tensor],
    indices: range,
    kept: int,
    parts: Path,
) -> None:
    labels = [label(i) for i in indices]
    latents, cost = sampler.latents(indices, labels)
    images = decode(latents)[:kept].cpu().numpy()
    capacity = cost.capacity()
    measured = np.empty(0) if capacity is None else capacity[:kept].double().cpu().numpy()
    with complete_file(parts / f"{indices[0]:09d}.npz") as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            images=images,
            labels=np.array(labels[:kept]),
            capacity=measured,
            nfe=np.full(kept, cost.calls),
        )


def _assemble(blocks: list[Path], num_samples: int, path: Path) -> SampleSet:
    """Join the blocks into one `.npz`, a block at a time: 50,000 images need no memory."""
    labels, capacities, evaluations, first = [], [], [], []
    with complete_file(path) as temporary, NpzWriter(temporary) as archive:
        for i, block in enumerate(blocks):
            with np.load(block) as part:
                images = part["images"]
                labels.append(part["labels"])
                capacities.append(part["capacity"])
                evaluations.append(part["nfe"])
            if len(first) < GRID_IMAGES:
                first.extend(images[: GRID_IMAGES - len(first)])
            if i == 0:
                archive.begin("arr_0", images.dtype, (num_samples, *images.shape[1:]))
            archive.append(images)
        all_labels = np.concatenate(labels)
        archive.begin("labels", all_labels.dtype, all_labels.shape)
        archive.append(all_labels)
    capacity = np.concatenate(capacities)
    mean = float(capacity.mean()) if len(capacity) else None
    nfe = float(np.concatenate(evaluations).mean())
    return SampleSet(path, torch.from_numpy(np.stack(first)), all_labels, mean, nfe)
