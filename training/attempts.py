"""Every start of a run, kept with it: who ran what, where, with which config and which code."""

import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import torch

from config.load import dump_config
from config.schema import Config
from core.distributed import Processes, restarts
from core.files import complete_file
from models.pretrained import CONFIG_FILE

FOLDER = "attempts"
PACKAGES = ("diffmoe", "torch", "numpy", "diffusers", "timm", "safetensors")


def is_restart_of(run_dir: Path) -> bool:
    """Whether torchrun started these processes anew, and an earlier try of theirs made the run.

    A launcher lives as long as its job. So a run belongs to the job of which at least one launcher
    was there when the run began.
    """
    if restarts() == 0:
        return False
    attempts = [json.loads(path.read_text()) for path in _records(run_dir)]
    begun = [about for about in attempts if about["step"] == 0]
    return bool(begun) and _launcher() in begun[-1]["launchers"]


def run_id(run_dir: Path) -> str:
    """A name of the run that no other has, the same at every start."""
    return json.loads(_records(run_dir)[-1].read_text())["run_id"]


def record_attempt(config: Config, step: int, processes: Processes) -> None:
    """Write <run_dir>/config.yaml, and attempts/<number>.json and .yaml, which stay.

    Args:
        config: resolved.
        step: from which this attempt goes on.
        processes: all of which call this.
    """
    own = {"launcher": _launcher(), "host": socket.gethostname(), "device": _device(processes)}
    everyone = processes.gather(own)
    if not processes.is_main:
        return
    run_dir = Path(config.run_dir)
    earlier = _records(run_dir)
    about = {
        "run_id": run_id(run_dir) if earlier and step > 0 else uuid.uuid4().hex,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "restarts": restarts(),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain", "--untracked-files=no") or "").split("\n"),
        "versions": {"python": platform.python_version()} | _versions(),
        "launchers": sorted({place["launcher"] for place in everyone}),
        "hosts": [place["host"] for place in everyone],
        "devices": [place["device"] for place in everyone],
    }
    about["changed_files"] = [line for line in about["changed_files"] if line]
    name = f"{len(earlier) + 1:04d}"
    texts = {
        run_dir / CONFIG_FILE: dump_config(config),
        run_dir / FOLDER / f"{name}.yaml": dump_config(config),
        run_dir / FOLDER / f"{name}.json": json.dumps(about, indent=2) + "\n",
    }
    for path, text in texts.items():
        with complete_file(path) as temporary:
            temporary.write_text(text)


def _records(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FOLDER).glob("[0-9]*.json"))


def _launcher() -> str:
    """The process that started this one: under torchrun the same for every restart on a host."""
    parent = os.getppid()
    try:
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = "?"
    return f"{socket.gethostname()} {parent} {started}"


def _device(processes: Processes) -> str:
    if processes.device.type == "cuda":
        return torch.cuda.get_device_name(processes.device)
    return f"cpu, {torch.get_num_threads()} thread(s)"


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda}


def _git(*words: str) -> str | None:
    """What git says of the code that runs; None where there is no git or no repository."""
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
