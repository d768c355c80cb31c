"""Which tensors of a model, whole or sharded, which process writes."""

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from core.distributed import Processes
from core.tensors import write_tensors

OFFSETS = "DCP_SHARDING_INFO"
"""Where torch.distributed.checkpoint's reader of safetensors looks for a shard's place."""


@dataclass
class Part:
    """What this process writes of one set of tensors.

    Attributes:
        file: path below the checkpoint's folder.
        tensors: by name.
        metadata: of the file.
    """

    file: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None = None


def part_of(name: str, tensors: dict[str, Tensor], processes: Processes) -> Part | None:
    """This process's part of `tensors`: all on the main one, or a shard of each on every one."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return Part(f"{name}.safetensors", tensors) if processes.is_main else None
    shards, offsets = {}, {}
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            local, chunks = tensor.to_local(), tensor.__create_chunk_list__()
            if local.numel() == 0 or not chunks or not _is_first_copy(tensor):
                continue
            shards[key], place = local, list(chunks[0].offsets)
        elif processes.is_main:
            shards[key], place = tensor, [0] * tensor.dim()
        else:
            continue
        offsets[key] = {"saved_offsets": place}
    if not shards:
        return None
    file = f"{name}/shard-{processes.rank + 1:05d}-model-00001-of-00001.safetensors"
    return Part(file, shards, {OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0"})


def _is_first_copy(tensor: DTensor) -> bool:
    """Whether no other process with the same shard comes before this one."""
    place = tensor.device_mesh.get_coordinate()
    return all(
        where == 0
        for where, how in zip(place, tensor.placements, strict=True)
        if how.is_replicate()
    )


def write_now(module: nn.Module, folder: Path, name: str, processes: Processes) -> None:
    """The weights of a module at once, by all processes, into a folder that is there."""
    part = part_of(name, module.state_dict(), processes)
    if part is not None:
        path = folder / part.file
        path.parent.mkdir(exist_ok=True)
        write_tensors(path, part.tensors, part.metadata)
