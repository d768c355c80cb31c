"""The Fréchet distance of a few samples while a model trains, from the averaged weights."""

from contextlib import nullcontext
from pathlib import Path

import torch

from config.schema import Config
from core.distributed import Processes
from core.logging import progress
from core.types import Objective
from data.dataset import TrainingData
from data.vae import VAE, PixelSpace, to_uint8
from evaluations.features import build_extractor
from evaluations.metrics import frechet_distance
from evaluations.reference import read_reference
from evaluations.statistics import RunningStatistics
from models.dit import DiT
from sampling.generate import Sampler
from sampling.labels import Labels, random_labels
from sampling.wanted import ByClass, ByImage, Wanted
from training.interruption import StopRequest


def wanted_of(config: Config, data: TrainingData, labels: Labels) -> Wanted:
    """What samples are made of while training: the captions of images, or classes."""
    if config.model.text_hidden_size is not None:
        return ByImage(data, config.seed)
    return ByClass(labels, config.model.num_classes)


class SampleScores:
    """Scores always the same noise and classes; every draw has a generator of its own.

    Args:
        config: reference, number of samples, network, sampler.
        objective: makes data of noise.
        vae: decoder, on this process's device.
        data: of the run.
        processes: share the blocks of samples.

    Raises:
        UserError: reference or weights cannot be read, or do not fit each other.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        vae: VAE | PixelSpace,
        data: TrainingData,
        processes: Processes,
    ):
        self.config, self.objective, self.vae = config, objective, vae
        self.latent_shape, self.processes = data.source.latent_shape, processes
        asked = config.evaluation
        weights = asked.classifier if asked.features == "digits" else asked.inception_weights
        path = None if weights is None else Path(weights)
        with processes.main_first():
            self.extractor = build_extractor(
                asked.features, path, asked.inception_sha256, processes.device
            )
        reference = read_reference(Path(asked.reference), self.extractor, images=False)
        self.name = "FID" if asked.features == "inception" else f"FD-{asked.features}"
        self.reference = reference.statistics_of("pool", self.name)
        labels = random_labels(config.model.num_classes, config.seed)
        self.wanted = wanted_of(config, data, labels)

    @torch.no_grad()
    def score(
        self, model: DiT, sharded: bool = False, stop: StopRequest | None = None
    ) -> dict[str, float] | None:
        """The distance by its name with the number of samples, on every process.

        Args:
            model: in evaluation mode.
            sharded: the processes can only compute together, so each does all blocks.
            stop: on which the work is broken off; the result is None then.
        """
        asked, processes = self.config.evaluation, self.processes
        sampler = Sampler(
            model,
            self.objective,
            self.config.sampling,
            self.latent_shape,
            self.config.seed,
            processes.device,
        )
        sums = RunningStatistics(len(self.reference[0]), processes.device)
        blocks = range(0, asked.num_samples, asked.batch_size)
        mine = blocks if sharded else blocks[processes.rank :: processes.world_size]
        with nullcontext() if stop is None else stop.interrupting(model, sharded):
            for first in progress(mine, processes, "scores", "block", leave=False):
                indices = range(first, first + asked.batch_size)
                latents, _ = sampler.latents(indices, self.wanted.condition(indices))
                images = to_uint8(self.vae.decode(latents))[: asked.num_samples - first]
                sums.update(self.extractor(images)["pool"])
        if stop is not None and stop.ask_all():
            return None
        if not sharded:
            sums.reduce(processes)
        distance = frechet_distance(*self.reference, *sums.result())
        return {f"{self.name}-{asked.num_samples}": distance}
