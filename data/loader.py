"""Batches of latents for one training process."""

from torch import Tensor
from torch.utils.data import DataLoader

from config.schema import Config
from core.distributed import Processes
from data.latents import LatentDataset
from data.sampler import MicroBatches


def training_loader(
    dataset: LatentDataset, config: Config, processes: Processes, first_step: int
) -> DataLoader:
    """Micro-batches (latents (B, C, H, W), labels (B,)) from `first_step` to the last step."""
    order = MicroBatches(
        len(dataset),
        config.train.global_batch_size,
        config.train.micro_batch_size,
        processes.rank,
        processes.world_size,
        config.seed,
        range(first_step, config.train.max_steps),
    )
    workers = config.data.num_workers
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=config.train.timeout if workers > 0 else 0,
        pin_memory=processes.device.type == "cuda",
    )


def _as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The data set gathers whole batches itself."""
    return batch
