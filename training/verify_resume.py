"""python -m training.verify_resume [--steps 24] [--kills 5] [--processes 1 2]

Train a tiny model without interruption, and again with everything that ends runs early: SIGKILL at
random moments and at the worst ones, SIGTERM in a step, in a sample grid and in a checkpoint,
Ctrl-C, a newest checkpoint that is damaged or cannot be read at first, and torchrun's restart.
Each run goes on with `--resume auto`; then every tensor of the last checkpoint, every logged number
and every grid is compared, bit by bit.
"""

import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config.load import parse_config
from config.schema import DataConfig
from core.command_line import Parser, natural, positive
from core.distributed import processes
from core.errors import UserError, command
from data.manifest import Manifest, Shard
from models.pretrained import find_checkpoint, read_tensors
from models.sealed import checkpoints
from training.faults import FAULTS, arm, damage_newest, unreadable_at_first, without_vae
from training.telemetry import METRICS_FILE
from training.trainer import train

ROOT = Path(__file__).parents[1]
KILL = "SIGKILL at a random moment"
IMAGES, CLASSES, SHAPE = 40, 3, (4, 4, 4)
TIMED = ("images_per_second", "mfu", "memory_gib", "seconds/")
"""Logged values that are never the same twice."""

Fault = tuple[str, int, float]
"""A name of FAULTS, a step, and seconds into it."""


@dataclass
class Case:
    """A run that ends early and goes on.

    Attributes:
        name: of what happens to it.
        fault: of FAULTS, that ends it.
        then: done to the run before it goes on.
        within: what it goes on in.
    """

    name: str
    fault: str
    then: Callable[[Path], None] | None = None
    within: Callable[[Path], AbstractContextManager] = nullcontext


def cases(kills: int) -> list[Case]:
    """Everything that is tried, with so many kills at random moments."""
    found = [Case(f"{KILL}, {i + 1}", KILL) for i in range(kills)]
    found += [Case(name, name) for name in FAULTS if name != KILL]
    stopped = "SIGTERM in a step"
    return [
        *found,
        Case("newest checkpoint damaged", stopped, then=damage_newest),
        Case("newest checkpoint unreadable at first", stopped, within=unreadable_at_first),
    ]


def verify(out: Path, steps: int, kills: int, world_size: int, seed: int = 0) -> list[str]:
    """Differences between disturbed runs and an undisturbed one; none if all is well.

    Args:
        out: empty folder to work in.
        steps: of each run.
        kills: runs killed at a random moment, besides one for each other case.
        world_size: processes of each run.
        seed: of the moments.
    """
    cache = write_cache(out / "cache")
    _finish(cache, out / "whole", steps, world_size)
    wanted, differences, moments = _outcome(out / "whole"), [], random.Random(seed)
    for number, case in enumerate(cases(kills)):
        run = out / f"run_{number}"
        moment = moments.randrange(4, steps - 2), moments.uniform(0, 0.05)
        _start(_flags(cache, run, steps), world_size, (case.fault, *moment))
        if case.then is not None:
            case.then(run)
        with case.within(run):
            reached = _finish(cache, run, steps, world_size)
        differences += _judge(case.name, world_size, reached, wanted, run)
    if world_size > 1:
        run = out / "restarted"
        reached = _restarted(_flags(cache, run, steps), run, world_size)
        no_grids = {key: value for key, value in wanted.items() if not key.startswith("grid")}
        differences += _judge(
            "SIGKILL, torchrun --max-restarts", world_size, reached, no_grids, run
        )
    return differences


def _judge(name: str, world_size: int, reached: int, wanted: dict, run: Path) -> list[str]:
    """Compare a run with the undisturbed one, and print a row of the table."""
    found = _compare(wanted, _outcome(run))
    verdict = "DIFFERENT" if found else "bitwise equal"
    sys.stdout.write(f"| {world_size} | {name:<40} | {reached:>4} | {verdict} |\n")
    sys.stdout.flush()
    return [f"{name}: {line}" for line in found]


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
        "train.sample_every": 6,
        "train.num_grid_samples": 3,
        "sampling.num_steps": 4,
    }
    return [f"--{key}={value}" for key, value in values.items()]


def _start(flags: list[str], world_size: int, fault: Fault | None = None) -> list[int]:
    """Run the processes to their end; their exit codes. A crash of one ends all.

    They are forked, since starting Python anew would take longer than the run.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world_size):
        started.append(context.Process(target=_work, args=(flags, rank, world_size, port, fault)))
        started[-1].start()
    for process in started:
        process.join()
        if process.exitcode != 0:
            for other in started:
                other.kill()
    return [process.exitcode for process in started]


def _work(flags: list[str], rank: int, world_size: int, port: int, fault: Fault | None) -> None:
    """One process of a run, as torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in (place | address).items()})
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  no progress
    logging.disable(logging.CRITICAL)
    without_vae()
    if fault is not None and rank == 0:
        arm(*fault)
    config = parse_config(flags, "verify_resume", world_size)
    with processes("cpu", cpu_threads=1) as group:
        train(config, group)


def _restarted(flags: list[str], run: Path, world_size: int) -> int:
    """Let torchrun finish a run of whose processes one is killed; where it went on from."""
    gone = ("--train.sample_every", "--train.num_grid_samples", "--resume")
    flags = [flag for flag in flags if not flag.startswith(gone)]
    flags += ["--train.sample_every=0", "--resume=never"]
    command_line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command_line += [f"--nproc_per_node={world_size}", "--max-restarts=1", "train.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command_line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    threading.Thread(target=_kill_one, args=(launcher, run), daemon=True).start()
    errors = launcher.communicate()[1]
    if launcher.returncode != 0:
        raise UserError(f"verify_resume: torchrun ended with {launcher.returncode}: {errors}")
    return _reached(run)


def _reached(run: Path) -> int:
    """Where the last attempt of a run began."""
    attempts = sorted((run / "attempts").glob("*.json"))
    return json.loads(attempts[-1].read_text())["step"]


def _kill_one(launcher: subprocess.Popen, run: Path) -> None:
    """Kill the last process of a launcher once there is a checkpoint."""
    while launcher.poll() is None and not checkpoints(run):
        time.sleep(0.01)
    with suppress(OSError, IndexError):  # it has ended by itself, which its code tells
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)


def _finish(cache: Path, run: Path, steps: int, world_size: int) -> int:
    """Let a run come to its end; the step from which it went on."""
    codes = _start(_flags(cache, run, steps), world_size)
    if any(codes):
        raise UserError(f"verify_resume: processes ended with codes {codes} in {run}")
    return _reached(run)


def _outcome(run: Path) -> dict[str, torch.Tensor | float | bytes]:
    """Everything that must be equal: tensors of the last checkpoint, logged numbers."""
    folder = find_checkpoint(run)
    found: dict[str, torch.Tensor | float | bytes] = {"step": float(folder.name[5:])}
    for path in sorted(folder.glob("*.safetensors")):
        found |= {f"{path.stem}: {name}": t for name, t in read_tensors(path).items()}
    for line in (run / METRICS_FILE).read_text().splitlines():
        entry = json.loads(line)
        for key, value in entry.items():
            if not key.startswith(TIMED):
                found[f"log, step {entry['step']}: {key}"] = value
    for path in (run / "samples").glob("*.png"):
        found[f"grid {path.name}"] = path.read_bytes()
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
    sys.stdout.write(
        "| processes | what happened | went on from step | result |\n|---|---|---|---|\n"
    )
    for world_size in flags.processes:
        with tempfile.TemporaryDirectory() as folder:
            differences += verify(Path(folder), flags.steps, flags.kills, world_size, flags.seed)
    sys.stdout.write("\n".join(differences) + "\n" if differences else "all bitwise equal\n")
    sys.exit(1 if differences else 0)


if __name__ == "__main__":
    main()
