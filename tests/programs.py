"""Programs of the project in processes of their own, which start in no time.

They are forked from a server that has imported everything once and computed nothing: a process
that has computed gradients or started threads cannot be forked.
"""

import importlib
import logging
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

PRELOADED = ["programs", "train", "sample_ddp", "main_cache", "training.faults"]


class Program:
    """A program that runs beside the test.

    Args:
        module: whose `main` it is, such as `train`.
        argv: its flags.
        log: file that takes its stderr.
        first: Python text that is run before `main`; see SCOPE for what it knows.
    """

    def __init__(self, module: str, argv: list, log: Path, first: str = ""):
        self.log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        words = [str(word) for word in argv]
        self.process = context.Process(target=_run, args=(module, words, log, first), daemon=False)
        self.process.start()
        self.pid = self.process.pid

    def end(self, timeout: float = 60) -> tuple[int, str]:
        """Exit code and stderr, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running: {self.log.read_text()}")
        return self.process.exitcode, self.log.read_text()

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


SCOPE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from programs import mount
from training.faults import before, without_vae
from training.looks import Looks
from training.step import TrainStep
import training.saving
"""


def _run(module: str, words: list[str], log: Path, first: str) -> None:
    import torch

    sys.argv = [f"{module}.py", *words]
    logging.root.handlers.clear()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    exec(SCOPE + first, {})
    importlib.import_module(module).main()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Return as soon as `condition` holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def mount(*words: str) -> None:
    """Give this process a mount that no other sees; `words` are the arguments of `mount`."""
    import ctypes
    import subprocess

    new_user, new_mounts = 0x10000000, 0x20000
    libc, user, group = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    subprocess.run(["mount", *map(str, words)], check=True)


def can_mount() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    import shutil
    import subprocess

    own = ["unshare", "--map-root-user", "--mount", "true"]
    return (
        bool(shutil.which("unshare")) and subprocess.run(own, capture_output=True).returncode == 0
    )


def pair(folder: Path, argv: list, first: tuple = ("", ""), module: str = "train") -> list[Program]:
    """A program as two processes that torchrun would start.

    Args:
        folder: for their logs.
        argv: flags.
        first: of `Program`, for each.
        module: of `Program`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        text = f"os.environ.update({ {k: str(v) for k, v in place.items()} })\n{first[rank]}"
        log = folder / f"rank_{rank}_{time.monotonic_ns()}"
        started.append(Program(module, argv, log, text))
    return started
