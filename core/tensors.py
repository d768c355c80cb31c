"""Safetensors files as a stream that is hashed on its way to the disk, and hashes of tensors."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the format; no tensor is followed by one of larger elements, so that all are aligned."""


@dataclass(frozen=True)
class Written:
    """A file as it was written: its size in bytes and its SHA-256."""

    bytes: int
    sha256: str


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Written:
    """Write tensors of any device as one safetensors file, and wait until it is on the disk.

    Nothing is read back, and only one tensor at a time is copied to the CPU.

    Args:
        path: of the file.
        tensors: by name.
        metadata: of the file.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in _pieces(tensors, metadata):
            digest.update(piece)
            size += len(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _pieces(tensors: dict[str, Tensor], metadata: dict[str, str] | None) -> Iterator[memoryview]:
    """Header and tensors; the format: length of the header, JSON padded to 8 bytes, the data."""
    ranks = {dtype: rank for rank, dtype in enumerate(DTYPES)}
    names = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, dict] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        shape, offsets = list(tensor.shape), [begin, end]
        dtype = DTYPES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().flatten()
        yield memoryview(flat.view(torch.uint8).numpy())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values, whatever files hold them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
