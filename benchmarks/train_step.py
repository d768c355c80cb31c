"""python -m benchmarks.train_step --config dit/S_flow diffmoe/S_E16_flow

The whole optimizer step of one process on random latents (forward, backward, clipping, optimizer,
thresholds, averages) for each config, as ratios to the first one: time, images/s, memory, and MFU
against a matrix product measured in the same run, and on known GPUs against the data sheet's peak
in bf16. --trace writes one step of the last config for a viewer of Chrome traces.
"""

import argparse
import copy
import dataclasses
import itertools
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.measure import (
    alternate,
    default_device,
    device_here,
    machine,
    report,
    sheet_peak,
)
from config.files import find_config
from config.load import load_config
from config.model import ModelConfig
from config.schema import Config
from core.command_line import Parser, file_to_write, positive
from core.conditions import Condition
from core.distributed import Processes
from core.errors import command
from core.files import complete_file
from core.heap import freed_memory_kept
from models.build import build_model
from sampling.objectives import build_objective
from training.ema import EMA
from training.flops import matmul_rate, training_flops
from training.optim import build_optimizer
from training.parallel import prepare
from training.step import TrainStep


def settings_of(name: str, flags: argparse.Namespace) -> Config:
    """A config with the benchmark's batch and ways to compute."""
    config = load_config(find_config(name))
    train = dataclasses.replace(
        config.train,
        global_batch_size=flags.batch_size,
        micro_batch_size=min(flags.batch_size, flags.micro_batch_size or flags.batch_size),
        precision=flags.precision,
        compile=flags.compile,
    )
    return dataclasses.replace(config, train=train)


def conditions(model: ModelConfig, count: int) -> Condition:
    """Random classes, or texts of as many tokens as there may be."""
    labels = torch.randint(max(model.num_classes, 1), (count,))
    if model.text_hidden_size is None:
        return Condition(labels)
    rows = torch.randn(count, model.text_max_length, model.text_hidden_size, dtype=torch.bfloat16)
    return Condition.of_rows(
        list(rows), model.text_max_length, labels if model.num_classes else None
    )


def stepper(config: Config, device: torch.device) -> Callable[[], object]:
    """A call that takes one step of a freshly initialised model."""
    torch.manual_seed(0)
    model = build_model(config.model).to(device).train()
    ema = EMA(copy.deepcopy(model), config.optim.ema_decay, warmup=False)
    optimizer = build_optimizer(model, config.optim)
    processes = Processes(0, 1, device)
    step = TrainStep(
        prepare(model, config, processes),
        model,
        build_objective(config.objective),
        optimizer,
        config,
        processes,
    )
    side, count = config.model.input_size, config.train.micro_batch_size
    x = torch.randn(count, config.model.in_channels, side, side, device=device)
    cond = conditions(config.model, count).to(device)
    numbers = itertools.count()

    def call() -> None:
        number = next(numbers)
        result = step(itertools.repeat((x, cond)), number)
        ema.update(model, number, result.finite)

    return call


def measure(name: str, flags: argparse.Namespace, device: torch.device) -> dict:
    """One config by itself, so that only its model is in memory."""
    config = settings_of(name, flags)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    call = stepper(config, device)
    call()  # the first step compiles and allocates
    seconds = alternate({"step": call}, flags.repeats, device)["step"]
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flops = training_flops(config.model) * flags.batch_size
    peak = sheet_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {
        "seconds": seconds,
        "img/s": flags.batch_size / seconds,
        "GiB": memory / 2**30,
        "GFLOP/img": flops / flags.batch_size / 1e9,
        "GFLOP/s": flops / seconds / 1e9,
        "MFU by data sheet": "" if peak is None else flops / seconds / peak,
    }


def trace(call: Callable[[], object], path: Path) -> None:
    """Write what the host and the GPU do in one call, and print what takes longest."""
    with torch.profiler.profile() as profiler:
        call()
    with complete_file(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    table = profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=25)
    sys.stdout.write(f"{table}\n")


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("benchmarks.train_step", __doc__)
    add = parser.add_argument
    add("--config", nargs="+", required=True, help="the first one is the baseline")
    add("--device", type=device_here, default=default_device(), help="where: cpu or cuda")
    add("--batch-size", type=positive, default=32, help="images of a step")
    add("--micro-batch-size", type=positive, help="images of a forward pass; by default all")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    add("--compile", action="store_true", help="compile the blocks")
    add("--repeats", type=positive, default=7, help="steps of each config in each of two rounds")
    add("--out", type=file_to_write, help="JSON file")
    add("--trace", type=file_to_write, help="JSON file of one step of the last config")
    return parser.parse_args(argv)


@command
@freed_memory_kept()
def main(argv: list[str] | None = None) -> None:
    """Measure all configs forwards and backwards, and report the better round of each."""
    flags = parse_flags(argv)
    place = torch.device(flags.device)
    found: dict[Path, dict] = {}
    for name in [*flags.config, *reversed(flags.config)]:
        row = measure(name, flags, place)
        if name not in found or row["seconds"] < found[name]["seconds"]:
            found[name] = row
    first = found[flags.config[0]]["seconds"]
    rate = matmul_rate(place, torch.bfloat16 if flags.precision == "bf16" else torch.float32)
    rows = [
        {"config": name, "step / first": row["seconds"] / first, **row}
        | {"MFU": 1e9 * row["GFLOP/s"] / rate}
        for name, row in found.items()
    ]
    settings = {k: str(v) for k, v in vars(flags).items()} | machine(place)
    title = f"batch {flags.batch_size}, {flags.precision}{', compiled' if flags.compile else ''}"
    report(title, rows, settings, flags.out)
    if flags.trace is not None:
        call = stepper(settings_of(flags.config[-1], flags), place)
        call()
        trace(call, flags.trace)


if __name__ == "__main__":
    main()
