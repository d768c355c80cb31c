"""Batches of latents for one training process."""

from collections.abc import Iterator

from torch.utils.data import DataLoader

from config.schema import Config
from core.distributed import Processes
from core.limits import check_shared_memory
from data.dataset import Batch, TrainingData
from data.sampler import MicroBatches, Position, Shuffled, ShuffledShards
from data.workers import steady


def training_batches(
    data: TrainingData, config: Config, processes: Processes, position: Position, steps: int
) -> Iterator[Batch]:
    """Micro-batches (latents (B, C, H, W), conditions) of `steps` steps from `position` on.

    Raises:
        UserError: the memory that processes share cannot hold the batches.
    """
    if config.data.order == "shards":
        order = ShuffledShards(data.source.shards, config.data.shuffle_window, config.seed)
    else:
        order = Shuffled(len(data), config.seed)
    micro_batches = MicroBatches(
        order,
        config.train.global_batch_size,
        config.train.micro_batch_size,
        processes.rank,
        processes.world_size,
        position,
        steps,
    )
    workers = config.data.num_workers
    if workers:
        each = config.train.micro_batch_size * data.fetched_bytes()
        check_shared_memory("data.num_workers", workers, each)
    loader = DataLoader(
        data,
        batch_sampler=micro_batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=steady,
        timeout=config.train.timeout if workers > 0 else 0,
        pin_memory=processes.device.type == "cuda",
    )
    return map(data.finish, loader)


def _as_it_is(batch: object) -> object:
    """The data set gathers whole batches itself."""
    return batch
