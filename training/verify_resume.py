"""python -m training.verify_resume [--steps 24] [--kills 5] [--processes 1 2]

Train a tiny model without interruption, and again with its processes killed by SIGKILL: at random
moments, and at the worst ones (in the middle of writing a checkpoint, before it gets its name,
before `latest` points to it). Each killed run goes on with `--resume auto`; then every tensor of
the last checkpoint and every logged number is compared, bit by bit.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import training.checkpoint
from config.load import parse_config
from config.schema import DataConfig
from core.command_line import Parser, natural, positive
from core.distributed import processes
from core.errors import UserError, command
from data.manifest import Manifest, Shard
from models.pretrained import find_checkpoint, read_tensors
from training.step import TrainStep
from training.telemetry import METRICS_FILE
from training.trainer import train

CRASHES = ("while writing", "before the rename", "before latest")
Crash = tuple[str, int, float]
"""One of CRASHES or `random`; for the latter a step and seconds into it."""
IMAGES, CLASSES, SHAPE = 40, 3, (4, 4, 4)
TIMED = ("images_per_second", "mfu", "memory_gib", "seconds/")
"""Logged values that are never the same twice."""


def verify(out: Path, steps: int, kills: int, world_size: int, seed: int = 0) -> list[str]:
    """Differences between killed runs and an uninterrupted one; none if all is well.

    Args:
        out: empty folder to work in.
        steps: of each run.
        kills: runs killed at a random moment, besides one for each of CRASHES.
        world_size: processes of each run.
        seed: of the moments.
    """
    cache = write_cache(out / "cache")
    _finish(cache, out / "whole", steps, world_size)
    wanted, differences, moments = _outcome(out / "whole"), [], random.Random(seed)
    cases = [(f"random kill {i + 1}", "random") for i in range(kills)]
    for name, crash in cases + [(crash, crash) for crash in CRASHES]:
        run = out / name.replace(" ", "_")
        moment = moments.randrange(1, steps), moments.uniform(0, 0.05)
        _start(_flags(cache, run, steps), world_size, (crash, *moment))
        reached = _finish(cache, run, steps, world_size)
        found = _compare(wanted, _outcome(run))
        differences += [f"{name}: {line}" for line in found]
        verdict = "DIFFERENT" if found else "bitwise equal"
        sys.stdout.write(
            f"{world_size} process(es), {name}: went on from step {reached}, {verdict}\n"
        )
    return differences


def write_cache(folder: Path) -> Path:
    """A cache of random latents."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    channels, height, width = SHAPE
    moments = draws.normal(size=(IMAGES, 2, 2 * channels, height, width)).astype(np.float32)
    labels = draws.integers(0, CLASSES, IMAGES)
    shard = Shard.write(folder, 0, moments, labels, [str(i) for i in range(IMAGES)])
    Manifest(
        vae_path=DataConfig().vae_path,
        vae_hash="never computed",
        scaling_factor=1.0,
        shift_factor=0.0,
        image_size=32,
        crop="adm",
        latent_shape=SHAPE,
        dtype="float32",
        class_names=[str(i) for i in range(CLASSES)],
        count=IMAGES,
        shards=[shard],
    ).write(folder)
    return folder


def _flags(cache: Path, run: Path, steps: int) -> list[str]:
    values = {
        "run_dir": run,
        "resume": "auto",
        "device": "cpu",
        "data.cached_path": cache,
        "data.image_size": 32,
        "data.num_workers": 1,
        "model.input_size": SHAPE[1],
        "model.patch_size": 1,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.depth": 2,
        "model.num_classes": CLASSES,
        "model.feed_forward.num_experts": 4,
        "model.feed_forward.capacity_schedule": f"[2, {steps}]",
        "optim.lr_schedule": "cosine",
        "optim.warmup_steps": 3,
        "optim.extra_ema_decays": "[0.9]",
        "train.max_steps": steps,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.log_every": 5,
        "train.ckpt_every": 3,
        "train.keep_last": 2,
        "train.sample_every": 0,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def _start(flags: list[str], world_size: int, crash: Crash | None = None) -> list[int]:
    """Run the processes to their end; their exit codes. A crash of the first ends all.

    They are forked, since starting Python anew would take longer than the run.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world_size):
        started.append(context.Process(target=_work, args=(flags, rank, world_size, port, crash)))
        started[-1].start()
    for process in started:
        process.join()
        if process.exitcode != 0:
            for other in started:
                other.kill()
    return [process.exitcode for process in started]


def _work(flags: list[str], rank: int, world_size: int, port: int, crash: Crash | None) -> None:
    """One process of a run, as torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in (place | address).items()})
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  no progress bars
    logging.disable(logging.CRITICAL)
    if crash is not None and rank == 0:
        _arm(*crash)
    config = parse_config(flags, "verify_resume", world_size)
    with processes("cpu", cpu_threads=1) as group:
        train(config, group)


def _arm(crash: str, step: int, delay: float) -> None:
    """Make this process kill itself: `delay` seconds into step `step`, or as CRASHES say."""
    if crash == "random":
        killer = threading.Timer(delay, _die)
        _before(TrainStep, "__call__", lambda self, batches, now: now == step and killer.start())
    elif crash == "while writing":
        _before(training.checkpoint, "seal", _second_time())
    elif crash == "before the rename":
        again = _second_time()
        _before(os, "replace", lambda old, new: Path(new).name.startswith("step_") and again())
    else:
        _before(training.checkpoint, "_point_latest", _second_time())


def _before(owner: Any, name: str, first: Callable) -> None:
    """Call `first` with the arguments of each call of `owner.name`, then go on."""
    function = getattr(owner, name)

    def call(*args: Any) -> Any:
        first(*args)
        return function(*args)

    setattr(owner, name, call)


def _second_time() -> Callable:
    calls = iter((lambda: None, _die))
    return lambda *args: next(calls)()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _finish(cache: Path, run: Path, steps: int, world_size: int) -> int:
    """Let a run come to its end; the step from which it went on."""
    found = training.checkpoint.checkpoints(run)
    codes = _start(_flags(cache, run, steps), world_size)
    if any(codes):
        raise UserError(f"verify_resume: processes ended with codes {codes} in {run}")
    return int(found[0].name[5:]) if found else 0


def _outcome(run: Path) -> dict[str, torch.Tensor | float]:
    """Everything that must be equal: tensors of the last checkpoint, logged numbers."""
    folder = find_checkpoint(run)
    found: dict[str, torch.Tensor | float] = {"step": float(folder.name[5:])}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.stem}: {name}": t for name, t in read_tensors(path).items()}
    for line in (run / METRICS_FILE).read_text().splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if not key.startswith(TIMED):
                found[f"log, step {entry['step']}: {key}"] = value
    return found


def _compare(wanted: dict, found: dict) -> list[str]:
    lines = [f"{name} is only on one side" for name in wanted.keys() ^ found.keys()]
    for name in wanted.keys() & found.keys():
        one, other = wanted[name], found[name]
        equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        if not equal:
            lines.append(f"{name} differs")
    return sorted(lines)


@command
def main() -> None:
    """Parse the command line, verify, end with code 1 where anything differs."""
    parser = Parser("training.verify_resume", __doc__)
    parser.add_argument("--steps", type=positive, default=24, help="of each run")
    parser.add_argument("--kills", type=natural, default=5, help="random ones")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="to try")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # threads of a parent do not survive a fork
    differences = []
    for world_size in flags.processes:
        with tempfile.TemporaryDirectory() as folder:
            differences += verify(Path(folder), flags.steps, flags.kills, world_size, flags.seed)
    sys.stdout.write("\n".join(differences) + "\n" if differences else "all bitwise equal\n")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
