"""Processes: one, or several started by torchrun, over NCCL on GPUs and gloo on CPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.errors import UserError
from core.heap import freed_memory_kept


@dataclass(frozen=True)
class Processes:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on rank 0, which logs and writes what belongs to all."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def from_main(self, value: Any) -> Any:
        """What the main process calls `value`, on every process."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        found = [value]
        if self.world_size > 1:
            found = [None] * self.world_size
            dist.all_gather_object(found, value)
        return found

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Mean of `tensor` over the processes, in place; every process gets it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over the processes, in place; every process gets it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the others run it (downloads, folders)."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()


def restarts() -> int:
    """How often torchrun started these processes anew after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _meeting_place(rank: int, world: int) -> dict[str, Any]:
    """Where the processes find each other, by default where torchrun says.

    After a restart its store may still hold the addresses of the processes that are gone, so the
    new ones meet under a prefix of their own.
    """
    if restarts() == 0:
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return {
        "store": dist.PrefixStore(f"restart {restarts()}", store),
        "rank": rank,
        "world_size": world,
    }


LOST = (
    *("timed out", "timeout", "connection closed", "connection reset", "connection refused"),
    *("exited unexpectedly", "is killed by signal", "broken pipe", "end of file"),
    *("nccl", "gloo", "remote process exited", "socket"),
)
"""What torch and its backends say, in small letters, when a process or a network is gone."""


@contextmanager
def losses_named() -> Iterator[None]:
    """One line for a loader worker or another process that died or does not answer.

    Raises:
        UserError: in place of the many errors of loaders and backends.
    """
    try:
        yield
    except UserError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        known = not isinstance(error, RuntimeError) or any(s in text.lower() for s in LOST)
        if not known:
            raise
        raise UserError(
            f"a data worker or another process died or does not answer: {text[:200]}; the first "
            "error of another process, if there is one, tells more; what is finished is kept, and "
            "the same command goes on from there (for training with --resume auto)"
        ) from error


NO_HURRY = 24 * 3600.0
"""Timeout where processes share whole blocks of work and one of them may have more of it to do."""


@contextmanager
def processes(
    device: str = "auto", cpu_threads: int | None = None, timeout: float = 600.0
) -> Iterator[Processes]:
    """Join torchrun's process group, or be a single process; leave the group at a good end.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        cpu_threads: threads of this process when it computes on the CPU; None leaves torch's
            choice. Products differ in their last bits between numbers of threads, so whatever
            must not depend on the number of processes sets this.
        timeout: seconds to wait for another process before giving up.

    Raises:
        UserError: for `cuda` on a machine without.
    """
    world = world_size()
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' is not available on this machine; allowed: auto, cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    elif cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    if world > 1:
        cuda = place.type == "cuda"
        dist.init_process_group(
            backend="nccl" if cuda else "gloo",
            device_id=place if cuda else None,
            timeout=timedelta(seconds=timeout),
            **_meeting_place(rank, world),
        )
    heap = freed_memory_kept() if place.type == "cpu" else nullcontext()
    try:
        with losses_named(), heap:
            yield Processes(rank, world, place)
    finally:
        torch.set_num_threads(threads)
    # Not after an error: NCCL would wait there for processes that wait for this one.
    if world > 1:
        dist.destroy_process_group()
