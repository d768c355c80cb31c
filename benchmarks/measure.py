"""Timing calls against each other, and writing down what was found."""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from core.files import complete_file

PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L40": 181,
    "A10": 125,
}
"""TFLOP/s of dense bf16 matrix products by NVIDIA's data sheets, by part of the GPU's name."""


def sheet_peak(name: str) -> float | None:
    """FLOP/s in bf16 that the data sheet of a GPU promises; None where it is not in the table."""
    words = name.replace("-", " ").split()
    known = (tera for part, tera in PEAKS.items() if set(part.split()) <= set(words))
    tera = next(known, None)
    return None if tera is None else 1e12 * tera


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_here(text: str) -> str:
    """A device that this machine has: the type of a flag."""
    allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if text.partition(":")[0] not in allowed:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not available on this machine; allowed: {', '.join(allowed)}"
        )
    return text


def alternate(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each call: one warm-up, then `repeats` rounds through all of them.

    Rounds, not one call after the other, so that a slow minute of the machine hits all alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            _wait(device)
            began = time.perf_counter()
            call()
            _wait(device)
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def activation_memory(
    forward: Callable[[], object], module: nn.Module, device: torch.device
) -> float:
    """Bytes that a forward pass keeps for the backward pass, weights not counted.

    On a GPU what it allocates at most; on the CPU, where torch does not count that, the sum of the
    distinct tensors that it saves.
    """
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        forward()
        return torch.cuda.max_memory_allocated(device) - before
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # held, so that no address is used twice
    del kept
    return float(sum(storages.values()))


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    name = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(": ")[2] if lines else name
    facts = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def report(title: str, rows: list[dict], settings: dict, out: Path | None) -> None:
    """Print a table with a column for each key of the rows, and write JSON where asked."""
    columns = list(rows[0])
    cells = [columns] + [[_text(row[key]) for key in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [title]
    for first, *rest in cells:
        padded = [cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    sys.stdout.write("\n".join(lines) + "\n\n")
    if out is not None:
        with complete_file(out) as temporary:
            temporary.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
