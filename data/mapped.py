"""Arrays that stay on disk."""

from pathlib import Path

import numpy as np
import torch

from core.errors import UserError


def mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype, field: str) -> np.ndarray:
    """A .npy file, mapped into memory; the pages belong to the system.

    By torch, since an array mapped by numpy holds a file descriptor, and 1024 is a usual limit.

    Args:
        path: the file.
        shape, dtype: that its header has to have.
        field: what it belongs to, to the user.

    Raises:
        UserError: the file cannot be read, or its header is not of this shape and dtype.
    """
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of .npy")
            header = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        if header != (shape, False, dtype):
            raise ValueError(f"holds {header[2]} {header[0]}, not {dtype} {shape}")
        raw = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{field}: cannot read {path}: {error}") from error
    return raw.numpy()[start:].view(dtype).reshape(shape)
