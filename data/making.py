"""Folders of data that one process makes from beginning to end, small trained models among them."""

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

from core.distributed import Processes
from core.errors import UserError
from core.files import complete_folder
from core.locks import exclusive

ALONE = Processes(0, 1, torch.device("cpu"))
"""This process by itself."""


@contextmanager
def made_alone(out: Path, field: str = "--out") -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes `out`; no second process makes it meanwhile.

    What killed processes left of it is removed first.

    Args:
        out: which nothing is in.
        field: what it is to the user.

    Raises:
        UserError: somebody else is making it, something is in it, or it cannot be written.
    """
    busy = out.with_name(f".{out.name}.lock")
    try:
        with exclusive(busy, field, ALONE):
            for left in out.parent.glob(f".{out.name}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
            with complete_folder(out) as folder:
                yield folder
    except OSError as error:
        raise UserError(f"{field}: cannot write to {out}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # another process holds it, or it was never made
            busy.rmdir()


def refuse_taken(out: Path, wanted: str, field: str = "--out") -> None:
    """Refuse an `out` that holds something, before any work is done.

    Args:
        out: to be made.
        wanted: what it is not.
        field: what it is to the user.

    Raises:
        UserError: it does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{field}: {out} exists and {wanted}; remove it or choose another folder")


def warm_cosine(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The learning rates of a small training: up for a twentieth of the steps, then down to zero.

    Args:
        optimizer: whose learning rate is the highest one.
        steps: of the training.
    """
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        rest = max(0.0, (step - warmup) / max(1, steps - warmup))
        return min((step + 1) / warmup, 0.5 * (1.0 + math.cos(math.pi * rest)))

    return LambdaLR(optimizer, factor)
